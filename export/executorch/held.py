"""The quantized checkpoint read back from a finished .pte, to rebuild the program with its blocks shown.

An XNNPACK program cannot be opened up: what lies inside a delegate has no names and no outputs. So its weights are
read back, and the program is built once more around them with its blocks shown. Norms and biases are the checkpoint's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from bluelm.block import block_of
from bluelm.errors import InputError
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.executorch.reader import read


@dataclass(frozen=True)
class Held(QuantizedCheckpoint):
    """A quantized checkpoint whose linears are those of a file."""

    found: dict[str, QuantizedTensor] = field(default_factory=dict)

    def ordered(self, name: str) -> OrderedWeight:
        return OrderedWeight(self.found[name]) if name in self.found else super().ordered(name)


def held(path: Path, quantized: QuantizedCheckpoint) -> Held:
    """The checkpoint with the codes and scales of every linear as the .pte at `path` holds them.

    A file names no weight. Each goes to the linear of its shape and width that most of its codes agree with, so
    that one with a few other codes, or other scales, is still found.

    Raises:
        InputError: the file holds other shapes or another number of linears.
    """
    left = list(read(path).linears)
    layers = range(quantized.config.num_layers)
    found: dict[str, QuantizedTensor] = {}
    linears = block_of(quantized.config).linears
    for name in [*(f"model.layers.{layer}.{linear}" for layer in layers for linear in linears), "lm_head"]:
        wanted = quantized.linear(name)
        index = _closest(wanted, left)
        if index is None:
            raise InputError(f"the program holds no weight of the shape of {name}", where=path)
        found[name] = left.pop(index)
    if left:
        raise InputError(f"the program holds {len(left)} weights that the model does not have", where=path)
    return Held(**{part.name: getattr(quantized, part.name) for part in fields(quantized)}, found=found)


def _closest(wanted: QuantizedTensor, left: list[QuantizedTensor]) -> int | None:
    """Index of the weight with most codes in common; None where none has the shape and width."""
    best, most = None, -1
    for index, one in enumerate(left):
        if one.shape != wanted.shape or one.bits != wanted.bits:
            continue
        if torch.equal(one.codes, wanted.codes):
            return index
        common = int((one.codes == wanted.codes).sum())
        if common > most:
            best, most = index, common
    return best
