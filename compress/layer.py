"""One linear layer by one recipe: the codes, and notes on how it went."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.gptq import factorize, gptq, objective
from compress.grid import choose_grid
from compress.quantized import QuantizedTensor
from compress.recipe import Recipe
from compress.rtn import round_to_nearest


@dataclass(frozen=True)
class Outcome:
    """A quantized weight, each row's loss at the layer's output, and notes for the report.

    Attributes:
        loss, plain_loss: float32 [out], e H eᵀ of each row, of this weight and of plain rounding; None without H.
    """

    weight: QuantizedTensor
    settings: dict[str, Any]
    loss: Tensor | None = None
    plain_loss: Tensor | None = None
    kept_plain: Tensor | None = None

    @property
    def notes(self) -> dict[str, Any]:
        """JSON values: settings, and what was lost beside what plain rounding loses (sums over rows)."""
        notes = dict(self.settings)
        if self.loss is not None and self.plain_loss is not None and self.kept_plain is not None:
            notes["loss"] = float(f"{float(self.loss.double().sum()):.6g}")
            notes["rtn_loss"] = float(f"{float(self.plain_loss.double().sum()):.6g}")
            notes["rows_rounded_to_nearest"] = int(self.kept_plain.sum())
        return notes

    def noting(self, **settings: Any) -> Outcome:
        """The same with more settings."""
        return replace(self, settings=self.settings | settings)

    def split(self, rows: list[int]) -> list[Outcome]:
        """The outcomes of weights that were stacked on each other."""
        w = self.weight
        pieces = zip(w.codes.split(rows), w.scales.split(rows), w.zeros.split(rows), strict=True)
        losses = [
            [None] * len(rows) if x is None else x.split(rows)
            for x in (self.loss, self.plain_loss, self.kept_plain)
        ]
        return [
            Outcome(
                QuantizedTensor(codes, scales, zeros, w.bits, w.group_size),
                self.settings,
                *(x[i] for x in losses),
            )
            for i, (codes, scales, zeros) in enumerate(pieces)
        ]


def round_linear(weight: Tensor, recipe: Recipe) -> Outcome:
    """Round to nearest by the recipe's widths; weight float32 [out, in]."""
    settings = {"method": "rtn", "bits": recipe.bits, "group_size": recipe.group_size}
    grid = choose_grid(weight, recipe.bits, recipe.group_size, recipe.symmetric, search=recipe.grid == "mse")
    return Outcome(grid.nearest(weight), settings)


def quantize_linear(weight: Tensor, hessian: Tensor, recipe: Recipe) -> Outcome:
    """GPTQ, or rounding on the searched grid for AWQ's scaled weights; never worse than plain rounding.

    A row whose loss e H eᵀ would exceed that of plain round-to-nearest is rounded to nearest, and counted.

    Args:
        weight: float32 [out, in].
        hessian: float32 [in, in], mean of x xᵀ.
    """
    bits, size = recipe.bits, recipe.group_size
    settings: dict[str, Any] = {"method": recipe.method, "bits": bits, "group_size": size}
    grid = choose_grid(weight, bits, size, recipe.symmetric, search=recipe.grid == "mse", hessian=hessian)
    if recipe.method == "gptq":
        feedback = factorize(hessian, recipe.damping, recipe.act_order)
        settings |= {
            "damping": feedback.damping,
            "factorizations": feedback.attempts,
            "dead_inputs": feedback.dead,
        }
        chosen = grid.holding(gptq(weight, grid, feedback))
    else:
        chosen = grid.nearest(weight)
    plain = round_to_nearest(weight, bits, size, recipe.symmetric)
    loss = objective(chosen.dequantize() - weight, hessian)
    plain_loss = objective(plain.dequantize() - weight, hessian)
    worse = loss > plain_loss
    if worse.any():
        chosen = _rows_from(chosen, plain, worse)
    return Outcome(chosen, settings, torch.minimum(loss, plain_loss), plain_loss, worse)


def _rows_from(chosen: QuantizedTensor, plain: QuantizedTensor, rows: Tensor) -> QuantizedTensor:
    """`chosen` with some rows of `plain`."""
    pick = rows.unsqueeze(1)
    return replace(
        chosen,
        codes=torch.where(pick, plain.codes, chosen.codes),
        scales=torch.where(pick, plain.scales, chosen.scales),
        zeros=torch.where(pick, plain.zeros, chosen.zeros),
    )
