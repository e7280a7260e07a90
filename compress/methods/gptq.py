"""GPTQ: columns are rounded one after another, each taking up the errors of those before it.

Minimizes tr((W - Ŵ) H (W - Ŵ)ᵀ), the squared error of the layer's output, for H = mean of x xᵀ.

The paper (Frantar et al., 2022, arXiv 2210.17323, eq. 2 and 3) pushes each column's error into the columns to
come through the Cholesky factor of H⁻¹. We pull instead, which needs no inverse: with H = (I + U) D (I + U)ᵀ, U
strictly upper triangular, D diagonal,

    Ŵ_k = round(W_k + (W - Ŵ)_{<k} U_{<k,k})

which Chee et al. (2023, arXiv 2307.13304, theorem 6) prove to be the same algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bluelm.errors import InputError
from bluelm.tensorfiles import is_finite
from calibration.walk import Moments
from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.descent import SYSTEM_BYTES, descend
from compress.methods.grid import Grid, choose_grid
from compress.methods.protocol import ROWS, Method, Options, SolvingCost, Statistics
from compress.widths.width import Widths

BLOCK = 64  # columns whose earlier errors are taken up in one matrix product (lazy batch)
DAMPING_STEP = 4.0  # by how much the damping rises when a factorization fails
ATTEMPTS = 32
COLUMN_SECONDS = 40e-6  # of the loop over columns: one of up to ROWS rows, on one core


@dataclass(frozen=True)
class Feedback:
    """How the errors of earlier columns enter later ones; shared by all weights with the same input.

    Attributes:
        order: int64 [in], the order in which columns are rounded.
        upper: float32 [in, in], U in that order, strictly upper triangular.
        pivots: float32 [in], the diagonal of D in that order.
        damping: what was added to the diagonal, as a share of its mean.
        attempts: factorizations until one held.
        dead: input channels that calibration never excited; their columns are rounded to nearest.
    """

    order: Tensor
    upper: Tensor
    pivots: Tensor
    damping: float
    attempts: int
    dead: int

    def solve(self, right: Tensor) -> Tensor:
        """X with X (H + damping) = right, both float32 [out, in] in the layer's own order of columns."""
        upper = self.upper
        x = torch.linalg.solve_triangular(upper.T, right[:, self.order], upper=False, left=False, unitriangular=True)
        x = torch.linalg.solve_triangular(upper, x / self.pivots, upper=True, left=False, unitriangular=True)
        return torch.empty_like(right).index_copy_(1, self.order, x)


def factorize(hessian: Tensor, damping: float = 0.01, act_order: bool = True) -> Feedback:
    """Factor H, raising the damping until it is positive definite.

    Args:
        hessian: float32 [in, in], symmetric, positive semidefinite but for rounding.
        damping: first share of the diagonal's mean that is added to the diagonal.
        act_order: round the columns of the most excited inputs first.

    Raises:
        InputError: the Hessian is not finite.
    """
    if not is_finite(hessian):
        raise InputError(
            "the calibration activations are not finite",
            fix="check the checkpoint's weights; the model overflows on the calibration text",
        )
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    order = torch.arange(len(diagonal), device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    lower, damping, attempts = _cholesky(hessian, order.flip(0), dead, damping)
    upper = lower.flip(0, 1)  # the Cholesky factor of H backwards, read backwards: H = R Rᵀ, R upper triangular
    del lower  # hundreds of MB in a wide layer
    pivots = upper.diagonal().clone()
    upper.div_(pivots).triu_(1)
    return Feedback(order, upper, pivots.square(), damping, attempts, int(dead.sum()))


def _cholesky(hessian: Tensor, order: Tensor, dead: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """(lower factor of H in `order`, damping that held, attempts); dead channels stand alone with a 1."""
    plain = torch.where(dead, 1.0, hessian.diagonal())[order]
    mean = hessian.diagonal()[~dead].mean().item() if not dead.all() else 1.0
    for attempt in range(1, ATTEMPTS + 1):
        lower = hessian[order.unsqueeze(1), order].mT  # by columns, as LAPACK has it: factored where it lies
        lower.diagonal().copy_(plain + damping * mean)
        failed = torch.zeros((), dtype=torch.int32, device=lower.device)
        with _one_thread():
            torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed and is_finite(lower):
            return lower, damping, attempt
        damping *= DAMPING_STEP
    raise InputError("no damping made the Hessian positive definite", fix="check the calibration text")


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK's factorizations differ in the last bit with the number of threads; on one they are always the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gptq(weight: Tensor, grid: Grid, feedback: Feedback) -> Tensor:
    """Codes of a weight, uint8 [out, in].

    Args:
        weight: float32 [out, in].
        grid: chosen beforehand from the weight (static groups: the order of columns leaves the groups alone,
            and a runtime needs no index of groups).
        feedback: from `factorize` of the layer's Hessian.
    """
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    columns = weight.T[feedback.order]  # [in, out]: a column is contiguous
    scales, zeros = grid.scales.float().T.contiguous(), grid.zeros.float().T.contiguous()  # [groups, out]
    groups = (feedback.order // size).tolist()  # of each column
    solved = _solve(columns, scales, zeros, groups, feedback.upper, grid.largest_code)
    codes = torch.empty_like(solved)
    codes[feedback.order] = solved
    return codes.T.contiguous()


def _solve(
    columns: Tensor, scales: Tensor, zeros: Tensor, group_of: Sequence[int], upper: Tensor, largest: int
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


def corrected(weight: Tensor, moments: Moments, feedback: Feedback, share: float) -> Tensor:
    """The weight that a linear should have had, given the errors already made in its input and in the stream.

    The least-squares fit of y = W x, pulled towards the weight W0 by the damping, is
    W = W0 + (C - W0 H) (H + λI)⁻¹ with C = mean of y xᵀ; `share` of the way there is taken. Fitting the
    quantized input to the float output is GPTAQ's idea (Li et al., 2025, arXiv 2504.02692); here y also makes
    up for what earlier layers left in the residual stream.

    Args:
        weight: float32 [out, in].
        feedback: the factorization of the same Hessian.
    """
    assert moments.cross is not None
    return weight + share * feedback.solve(moments.cross - weight @ moments.hessian)


class GptqOptions(Options):
    """What a recipe may set of GPTQ.

    Attributes:
        damping: first share of the Hessian's mean diagonal that is added to it.
        act_order: the columns of the most excited inputs are rounded first; groups stay in place.
        sweeps: times that codes and scales are visited once more, each moved to where it is best with all others
            as they are (below 8 bits).
        correction: how far o_proj and down_proj make up for errors that earlier layers left in the stream: 0 not at
            all (plain GPTQ, one forward pass less), 1 as far as least squares goes.
    """

    section: ClassVar[str] = "gptq"
    at_top: ClassVar[bool] = True

    damping: float = Field(default=0.01, gt=0, le=1)
    act_order: bool = True
    sweeps: int = Field(default=4, ge=0, le=10**6)
    correction: float = Field(default=0.5, ge=0, le=1)

    def sweeps_at(self, bits: int) -> int:
        """At 8 bits there is nothing to gain."""
        return self.sweeps if bits < 8 else 0


@dataclass(frozen=True)
class GptqSolver:
    """One stage's Hessian with its factor."""

    hessian: Tensor
    feedback: Feedback
    options: GptqOptions

    @property
    def note(self) -> Mapping[str, Any]:
        found = self.feedback
        return {"damping": found.damping, "factorizations": found.attempts, "dead_inputs": found.dead}

    def target(self, weight: Tensor, cross: Tensor | None) -> Tensor:
        if cross is None:
            return weight
        return corrected(weight, Moments(self.hessian, cross), self.feedback, self.options.correction)

    def codes(self, target: Tensor, widths: Widths, search: bool) -> QuantizedTensor:
        # errors are moved between columns, so that what one column's error does by itself tells little: no Hessian
        grid = choose_grid(target, widths.bits, widths.group_size, widths.symmetric, search=search)
        rounded, sweeps = grid.holding(gptq(target, grid, self.feedback)), self.options.sweeps_at(widths.bits)
        return descend(target, rounded, self.hessian, self.feedback.damping, sweeps)


class Gptq(Method[GptqOptions]):
    """GPTQ, then coordinate descent over codes and scales."""

    options = GptqOptions

    def statistics(self, options: GptqOptions) -> Statistics:
        return Statistics(inputs=True, float_stream=options.correction > 0)

    def solver(self, hessian: Tensor | None, options: GptqOptions) -> GptqSolver:
        assert hessian is not None
        return GptqSolver(hessian, factorize(hessian, options.damping, options.act_order), options)

    def cost(self, out: int, columns: int, widths: Widths, options: GptqOptions) -> SolvingCost:
        sweeps = options.sweeps_at(widths.bits)
        groups = 1 if widths.group_size == -1 else columns // widths.group_size
        return SolvingCost(
            # both losses and the errors that are moved on; a sweep moves the codes, fits the scales, and weighs both
            operations=(5 + 4 * sweeps) * out * columns**2,
            factorization_operations=columns**3 / 3,
            loop_seconds=-(-out // ROWS) * columns * (1 + sweeps) * COLUMN_SECONDS,
            # three copies of the rows' systems, which the scales are fitted with
            system_bytes=3 * min(SYSTEM_BYTES, 4 * ROWS * groups**2) if sweeps else 0,
        )


METHOD = Gptq()
