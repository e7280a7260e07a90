"""Comparing what a file holds with what the checkpoint chose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from compress.quantized import QuantizedTensor
from compress.store import EMBED, QuantizedCheckpoint
from export.artifact import Artifact
from export.embedding import EmbeddingTable
from export.onnx_reader import Stored
from export.packing import unpack


def listed(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def same(wanted: QuantizedTensor, found: Stored) -> bool:
    """Equal codes, zero points and scales; a scale may be repeated over smaller blocks, exactly."""
    if found.bits != wanted.bits or found.codes.shape != wanted.shape or found.scales.shape[1] % wanted.groups:
        return False
    repeat = found.scales.shape[1] // wanted.groups
    scales = wanted.scales.float().numpy().repeat(repeat, axis=1)
    zeros = wanted.zeros.numpy().repeat(repeat, axis=1)
    held = np.full(zeros.shape, 2 ** (wanted.bits - 1)) if found.zeros is None else found.zeros
    return (
        np.array_equal(found.codes, wanted.codes.numpy())
        and np.array_equal(found.scales.astype(np.float32), scales)
        and np.array_equal(held, zeros)
    )


def table_faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """The file of embedding rows."""
    wanted, found = quantized.embed(), EmbeddingTable.open(artifact.path("embedding"))
    codes = unpack(np.asarray(found.codes[:]), found.bits, found.hidden)
    if not same(wanted, Stored(codes, found.scales, found.zeros, found.bits)):
        yield EMBED


def stored(tensor: QuantizedTensor) -> Stored:
    return Stored(tensor.codes.numpy(), tensor.scales.numpy(), tensor.zeros.numpy(), tensor.bits)
