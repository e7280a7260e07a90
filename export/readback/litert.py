"""LiteRT, read back."""

from __future__ import annotations

from collections.abc import Iterator

from compress.store import QuantizedCheckpoint
from export.artifact import Artifact
from export.readback.held import same, stored, table_faults
from export.readback.items import linear_names


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    from export.litert_reader import read

    found = read(artifact.path("model")).linears
    for name in linear_names(quantized):
        if name not in found or not same(quantized.linear(name), stored(found[name])):
            yield name
    yield from table_faults(artifact, quantized)
