"""End tokens that files of some formats name: where they differ from the checkpoint's, or None."""

from __future__ import annotations

from collections.abc import Set

from bluelm.system.reading import read_json
from export.artifacts.artifact import Artifact


def genai(artifact: Artifact, wanted: Set[int]) -> str | None:
    """genai_config.json names all of them."""
    told = read_json(artifact.path("genai"))["model"]["eos_token_id"]
    same = {*(told if isinstance(told, list) else [told])} == wanted
    return None if same else f"genai_config.json says {told}, the checkpoint {sorted(wanted)}"


def xnnpack(artifact: Artifact, wanted: Set[int]) -> str | None:
    """A method of the program gives all of them."""
    from export.executorch.reader import constant, read_program

    told = constant(read_program(artifact.path("model")), "get_eos_ids")
    same = told is not None and set(told) == wanted
    return None if same else f"model.pte says {told}, the checkpoint {sorted(wanted)}"


def gguf(artifact: Artifact, wanted: Set[int]) -> str | None:
    """The file names one of them."""
    from export.gguf.reader import GgufWeights

    told = GgufWeights(artifact.path("model"), artifact.model).fields["tokenizer.ggml.eos_token_id"].contents()
    return None if told in wanted else f"model.gguf says {told}, the checkpoint {sorted(wanted)}"
