"""GPTQ: columns are rounded one after another, each taking up the errors of those before it.

Minimizes tr((W - Ŵ) H (W - Ŵ)ᵀ), the squared error of the layer's output, for H = mean of x xᵀ.

The paper (Frantar et al., 2022, arXiv 2210.17323, eq. 2 and 3) pushes each column's error into the columns to come
through the Cholesky factor of H⁻¹. We pull instead, which needs no inverse: with H = (I + U) D (I + U)ᵀ, U strictly
upper triangular, D diagonal,

    Ŵ_k = round(W_k + (W - Ŵ)_{<k} U_{<k,k})

which Chee et al. (2023, arXiv 2307.13304, theorem 6) prove to be the same algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bluelm.errors import InputError
from compress.grid import Grid

BLOCK = 64  # columns whose earlier errors are taken up in one matrix product (lazy batch)
ROWS = 8192  # rows solved at a time: bounds the memory of wide layers
DAMPING_STEP = 4.0  # by how much the damping rises when a factorization fails


@dataclass(frozen=True)
class Feedback:
    """How the errors of earlier columns enter later ones; shared by all weights with the same input.

    Attributes:
        order: int64 [in], the order in which columns are rounded.
        upper: float32 [in, in], U in that order, strictly upper triangular.
        damping: what was added to the diagonal, as a share of its mean.
        attempts: factorizations until one held.
        dead: input channels that calibration never excited; their columns are rounded to nearest.
    """

    order: Tensor
    upper: Tensor
    damping: float
    attempts: int
    dead: int


def factorize(hessian: Tensor, damping: float = 0.01, act_order: bool = True) -> Feedback:
    """Factor H, raising the damping until it is positive definite.

    Args:
        hessian: float32 [in, in], symmetric, positive semidefinite but for rounding.
        damping: first share of the diagonal's mean that is added to the diagonal.
        act_order: round the columns of the most excited inputs first.

    Raises:
        InputError: the Hessian is not finite.
    """
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all():
        raise InputError(
            "the calibration activations are not finite",
            fix="check the checkpoint's weights; the model overflows on the calibration text",
        )
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    # Factor from the last column up, H = R Rᵀ with R upper triangular: a Cholesky of the reversed matrix.
    backwards = order.flip(0)
    reversed_hessian = hessian[backwards][:, backwards]
    reversed_diagonal = reversed_hessian.diagonal()
    reversed_diagonal[dead[backwards]] = 1.0
    mean = diagonal[~dead].mean().item() if not dead.all() else 1.0
    plain = reversed_diagonal.clone()
    for attempt in range(1, 64):
        reversed_diagonal.copy_(plain + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(reversed_hessian)
        if not failed and torch.isfinite(lower.diagonal()).all():
            break
        damping = max(damping, 1e-4) * DAMPING_STEP
    else:
        raise InputError("no damping made the Hessian positive definite", fix="check the calibration text")
    upper = lower.flip(0, 1)
    upper = (upper / upper.diagonal()).triu_(1)
    return Feedback(order, upper, damping, attempt, int(dead.sum()))


def gptq(weight: Tensor, grid: Grid, feedback: Feedback) -> Tensor:
    """Codes of a weight, uint8 [out, in].

    Args:
        weight: float32 [out, in].
        grid: chosen beforehand from the weight (static groups: the order of columns leaves the groups alone, and a
            runtime needs no index of groups).
        feedback: from `factorize` of the layer's Hessian.
    """
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    group_of = feedback.order // size
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for rows in torch.arange(weight.shape[0]).split(ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        scales, zeros = grid.scales[part].float().T, grid.zeros[part].float().T  # [groups, out]
        columns = weight[part].T[feedback.order]  # [in, out]: a column is contiguous
        solved = _solve(columns, scales.contiguous(), zeros.contiguous(), group_of, feedback.upper, grid.largest_code)
        restored = torch.empty_like(solved)
        restored[feedback.order] = solved
        codes[part] = restored.T
    return codes


def _solve(
    columns: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, upper: Tensor, largest: int
) -> Tensor:
    """uint8 [in, out]: codes of `columns` [in, out] in the order given; scales, zeros [groups, out]."""
    codes = torch.empty_like(columns, dtype=torch.uint8)
    errors = torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        block = slice(start, start + BLOCK)
        wanted = torch.addmm(columns[block], upper[:start, block].T, errors[:start])  # earlier blocks' errors
        inner = upper[block, block].T.contiguous()
        block_errors = errors[block]
        for i in range(len(wanted)):
            target = wanted[i]
            if i:
                target = torch.addmv(target, block_errors[:i].T, inner[i, :i])
            k = start + i
            scale, zero = scales[group_of[k]], zeros[group_of[k]]
            code = (target / scale).round_().add_(zero).clamp_(0, largest)
            codes[k] = code
            torch.addcmul(columns[k], code.sub_(zero), scale, value=-1, out=block_errors[i])
    return codes


def objective(error: Tensor, hessian: Tensor) -> Tensor:
    """float32 [out]: each row's e H eᵀ, its mean squared error at the layer's output. error: float32 [out, in]."""
    return torch.linalg.vecdot(error @ hessian, error)
