"""What genai_config.json tells Qualcomm's plug-in of compiled stages."""

from __future__ import annotations

from export.artifacts.artifact import Artifact


def provider_options(soc_model: int, hexagon_arch: int) -> dict[str, str]:
    """Of the plug-in: the NPU of this chip."""
    return {"backend_type": "htp", "soc_model": str(soc_model), "htp_arch": str(hexagon_arch)}


def provider_of(artifact: Artifact) -> dict[str, str] | None:
    """What the compiler was told of the chip, which a compiled artifact's stages have to be told as well; None: the
    CPU runs it."""
    if artifact.given is None:
        return None
    told = artifact.given.settings["shipped"]
    return provider_options(int(told["soc_model"]), int(told["htp_arch"]))
