"""Compares what a file holds with the quantized checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable
from export.artifacts.packing import unpack
from export.onnx.reader import HeldWeight
from export.readback import items


def listed(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def same(wanted: QuantizedTensor, found: HeldWeight) -> bool:
    """Equal codes, zero points and scales; a scale may be repeated over smaller blocks, exactly."""
    return not faults(wanted, found)


def faults(wanted: QuantizedTensor, found: HeldWeight) -> list[str]:
    """What is another: `codes`, `scales`, `zero points`, or their layout."""
    if found.bits != wanted.bits or found.codes.shape != wanted.shape:
        return [f"{found.bits} bits {found.codes.shape} instead of {wanted.bits} bits {wanted.shape}"]
    if found.scales.shape[1] % wanted.groups:
        return [f"{found.scales.shape[1]} scales a row instead of {wanted.groups}"]
    repeat = found.scales.shape[1] // wanted.groups
    scales = wanted.scales.float().numpy().repeat(repeat, axis=1)
    zeros = wanted.zeros.numpy().repeat(repeat, axis=1)
    held = np.full(zeros.shape, 2 ** (wanted.bits - 1)) if found.zeros is None else found.zeros
    wrong = {
        "codes": not np.array_equal(found.codes, wanted.codes.numpy()),
        "scales": not np.array_equal(found.scales.astype(np.float32), scales),
        "zero points": not np.array_equal(held, zeros),
        "codes behind the last column": found.spare,
    }
    return [name for name, is_wrong in wrong.items() if is_wrong]


def table_faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """EMBED where the file of embedding rows holds others."""
    if any(finding.state == "wrong" for finding in table(artifact, quantized)):
        yield EMBED


def table(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """The file of embedding rows."""
    wanted, found = quantized.embed(), EmbeddingTable.open(artifact.path("embedding"))
    codes = unpack(np.asarray(found.codes[:]), found.bits, found.hidden)
    yield from items.checked(EMBED, faults(wanted, HeldWeight(codes, found.scales, found.zeros, found.bits)))


def stored(tensor: QuantizedTensor) -> HeldWeight:
    return HeldWeight(tensor.codes.numpy(), tensor.scales.numpy(), tensor.zeros.numpy(), tensor.bits)
