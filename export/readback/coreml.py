"""Core ML packages, read back."""

from __future__ import annotations

from collections.abc import Iterator

from compress.store import EMBED, QuantizedCheckpoint
from export.artifact import Artifact
from export.readback.items import linear_names


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    from export.coreml import holds, packages
    from export.coreml_package import Package
    from export.coreml_program import DECODE, PREFILL

    functions = [
        (package, dict(package.constants(function)))
        for package in map(Package.open, packages(artifact))
        for function in (PREFILL, DECODE)
    ]
    for name in [*linear_names(quantized), "embed"]:
        tensor = quantized.embed() if name == "embed" else quantized.linear(name)
        found = [holds(package, constants, name, tensor) for package, constants in functions]
        if sum(one is True for one in found) != 2 or False in found:
            yield EMBED if name == "embed" else name
