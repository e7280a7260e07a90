"""Scales on the columns of a stage's linears, undone by what makes their inputs: the block computes the same."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bluelm.block import Move


def fold(tensors: Mapping[str, Tensor], place: Move, scales: Tensor, reads: Tensor) -> dict[str, Tensor]:
    """The tensors of a block, columns of the stage's linears times the scales, rows before them divided.

    The block computes the same function, up to rounding in float32.
    """
    folded = dict(tensors)
    for kind in ("weight", "bias"):
        name = f"{place.before}.{kind}"
        if name in folded:
            tensor = folded[name]
            folded[name] = tensor / (scales if tensor.ndim == 1 else scales.unsqueeze(1))
    for linear in place.stage.linears:
        folded[f"{linear}.weight"] = folded[f"{linear}.weight"] * scales[reads]
    return folded
