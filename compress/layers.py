"""From weights and moments to codes: a recipe's method for the linears of one stage, with a note on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibration.ranks import ALONE, Ranks
from calibration.walk import Moments
from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.loss import objective
from compress.methods.protocol import ROWS, Solver
from compress.methods.rtn import Nearest, round_to_nearest
from compress.recipe import Recipe, Widths


@dataclass(frozen=True)
class Solved:
    """A quantized weight and what is to be told about it: plain JSON values."""

    weight: QuantizedTensor
    note: dict[str, Any]


def solve_stage(
    weights: Mapping[str, Tensor],
    moments: Moments,
    widths: Mapping[str, Widths],
    recipe: Recipe,
    ranks: Ranks = ALONE,
    unclipped: Set[str] = frozenset(),
) -> dict[str, Solved]:
    """Quantize linears that read the same activations.

    Every row keeps the better of the method's codes and plain rounding by the error e H eᵀ of its output, so
    that no layer ends up worse than rounding; how many rows were kept rounded is noted.

    Args:
        weights: float32 [out, in] by name, on any device; what comes back is on the CPU.
        moments: of what they read; `cross` only where there is one linear.
        ranks: take turns at the rows of all linears; everybody gets everything back.
        widths: of each, by the same names.
        unclipped: those whose groups span their extremes whatever the recipe says.
    """
    hessian = moments.hessian
    solver = recipe.quantizer.solver(hessian, recipe.quantizer_options)
    note = {"method": recipe.method, **solver.note}
    tasks = [(name, start) for name, weight in weights.items() for start in range(0, len(weight), ROWS)]
    own: dict[tuple[str, int], _Rows] = {}
    for name, start in tasks[ranks.rank :: ranks.size]:
        rows = slice(start, start + ROWS)
        cross = None if moments.cross is None else moments.cross[rows]
        target = solver.target(weights[name][rows].to(hessian.device), cross)
        search = searches(recipe, widths[name].bits) and name not in unclipped
        own[name, start] = _solve_rows(target, hessian, widths[name], solver, search)
    done = {task: found for part in ranks.gathered(own) for task, found in part.items()}
    solved: dict[str, Solved] = {}
    for name in weights:
        parts = [done[task] for task in tasks if task[0] == name]
        losses = {
            "loss": _round(sum(part.loss for part in parts)),
            "loss_rounding": _round(sum(part.loss_rounding for part in parts)),
            "rows_rounded": sum(part.rows_rounded for part in parts),
        }
        clipped = {"clipped": False} if name in unclipped else {}
        solved[name] = Solved(stack_rows([part.weight for part in parts]), widths[name].note | note | losses | clipped)
    return solved


def searches(recipe: Recipe, bits: int) -> bool:
    """Whether grids of so many bits are searched: at 8 bits there is nothing to gain."""
    return recipe.grid == "mse" and bits < 8


def solve_without_text(weight: Tensor, widths: Widths, recipe: Recipe) -> Solved:
    """Quantize by a method that asks calibration for nothing. weight: float32 [out, in]."""
    solver = recipe.quantizer.solver(None, recipe.quantizer_options)
    return Solved(_by_parts(weight, widths, recipe, solver), {**widths.note, "method": recipe.method, **solver.note})


def round_plainly(weight: Tensor, widths: Widths, recipe: Recipe) -> Solved:
    """Round to nearest whatever the method is, as tables are, on the grid that the recipe asks for."""
    return Solved(_by_parts(weight, widths, recipe, Nearest(None)), {**widths.note, "method": "rtn"})


def _by_parts(weight: Tensor, widths: Widths, recipe: Recipe, solver: Solver) -> QuantizedTensor:
    search = searches(recipe, widths.bits)
    return stack_rows([solver.codes(rows, widths, search).to("cpu") for rows in weight.split(ROWS)])


def stack_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One weight of the rows of several, all of the same width and groups."""
    first = parts[0]
    if len(parts) == 1:
        return first
    codes, scales, zeros = (torch.cat([getattr(part, of) for part in parts]) for of in ("codes", "scales", "zeros"))
    return QuantizedTensor(codes, scales, zeros, first.bits, first.group_size)


@dataclass(frozen=True)
class _Rows:
    """Codes of some rows, their loss, that of plain rounding, and how many were kept rounded."""

    weight: QuantizedTensor
    loss: float
    loss_rounding: float
    rows_rounded: int


def _solve_rows(target: Tensor, hessian: Tensor, widths: Widths, solver: Solver, search: bool) -> _Rows:
    """Some rows, each the better of the method's codes and of plain rounding."""
    bits, size, symmetric = widths.bits, widths.group_size, widths.symmetric
    tuned = solver.codes(target, widths, search)
    rounded = round_to_nearest(target, bits, size, symmetric)
    loss = objective(target - tuned.dequantize(), hessian)
    rounding = objective(target - rounded.dequantize(), hessian)
    worse = loss > rounding
    keep = worse.unsqueeze(1)
    best = QuantizedTensor(
        torch.where(keep, rounded.codes, tuned.codes),
        torch.where(keep, rounded.scales, tuned.scales),
        torch.where(keep, rounded.zeros, tuned.zeros),
        bits,
        size,
    )
    return _Rows(best.to("cpu"), torch.minimum(loss, rounding).sum().item(), rounding.sum().item(), int(worse.sum()))


def _round(value: float) -> float:
    """Six digits: enough to read, and no more than float32 sums hold."""
    return float(f"{value:.6g}")
