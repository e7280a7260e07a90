"""Balance: loud and quiet channels of what a linear reads are brought nearer each other, for runtimes that round it.

    linear(W, x) == linear(W * s, x / s)

with s on the columns of W and 1/s on the rows of the linear that makes x, as SmoothQuant does behind norms (Xiao et
al., 2022, arXiv 2211.10438). Here every s is a power of two, and the linear before has its codes already: its scales
are divided exactly, its codes stay, and nothing is left to do at run time. What norms make is levelled by rotating.

    s_c = 2 ** round(log2(rms(x_c) ** EXPONENT)), around 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bluelm.block import Move
from calibration.walk import Moments
from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.folding import fold

EXPONENT = 0.5  # of the channels' magnitude: 1 would make all alike, and the columns of W as uneven as x was
FARTHEST = 6  # powers of two


@dataclass(frozen=True)
class Balance:
    """Powers of two on the columns of a stage's linears, and on the rows of the one before them.

    Attributes:
        move: where they stand.
        rows: float32 [channels], by which rows of the linear before are divided.
        columns: float32 [in], by which the columns of the linears behind are multiplied.
    """

    move: Move
    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(hessian: Tensor, move: Move, before: QuantizedTensor) -> Balance:
        """By what the stage's linears read.

        Args:
            hessian: float32 [in, in], mean of x xᵀ.
            before: the linear whose rows make x; channels whose scales would not be divided exactly keep 1.
        """
        reads = torch.tensor(move.channels)
        squares = hessian.diagonal().cpu()
        total = squares.new_zeros(before.shape[0]).index_add_(0, reads, squares)
        magnitude = (total / torch.bincount(reads, minlength=before.shape[0]).clamp_min(1)).sqrt()
        alive = magnitude > 0
        logs = torch.where(alive, magnitude, 1.0).log2()
        middle = logs[alive].mean() if alive.any() else logs.new_zeros(())
        powers = ((logs - middle) * EXPONENT).round().clamp(-FARTHEST, FARTHEST)
        rows = torch.where(alive, 2.0**powers, 1.0)
        exact = (divided(before, rows).scales.float() * rows.unsqueeze(1) == before.scales.float()).all(1)
        rows = torch.where(exact, rows, 1.0)
        return Balance(move, rows, rows[reads])

    @property
    def note(self) -> dict[str, Any]:
        """As a plain value: the largest ratio of two channels' scales."""
        return {"balanced": float(self.rows.max() / self.rows.min())}

    def moments(self, moments: Moments) -> Moments:
        """Those of the balanced x."""
        columns = self.columns.to(moments.hessian.device)
        cross = None if moments.cross is None else moments.cross / columns
        return replace(moments, hessian=moments.hessian / columns / columns.unsqueeze(1), cross=cross)

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the block, the scales folded in."""
        device = tensors[f"{self.move.before}.weight"].device
        return fold(tensors, self.move, self.rows.to(device), torch.tensor(self.move.channels, device=device))


def divided(weight: QuantizedTensor, by: Tensor) -> QuantizedTensor:
    """Rows divided by `by` [out]: the same codes on other scales."""
    return replace(weight, scales=(weight.scales.float() / by.unsqueeze(1)).to(weight.scales.dtype))
