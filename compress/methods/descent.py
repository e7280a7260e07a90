"""Behind GPTQ: codes and scales moved one at a time to where the layer's error is least, the others as they are.

GPTQ rounds each column once, knowing only the columns before it. Afterwards all are known: for column k of a row with
error e = ŵ - t, the others fixed, e H eᵀ is least where e_k = -sum_{j != k} e_j H_jk / H_kk, so that its code is

    round((t_k + e_k) / s) = round((t_k + e_k - (e H)_k / H_kk) / s)       e_k on the right as it was

A sweep does so for every column; no step makes the error larger (cyclic coordinate descent, as in QuantEase, Behdin et
al., 2023, arXiv 2309.01885). Then the scales of a row, its codes given: a row is t ~ sum_g s_g q_g, q_g the codes of
group g less their zero point, and the best scales solve

    M s = b,   M[g, h] = q_g H[g, h] q_hᵀ,   b[g] = q_g (H tᵀ)[g]
"""

from __future__ import annotations

from operator import itemgetter

import torch
from torch import Tensor

from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.grid import representable
from compress.methods.loss import objective

BLOCK = 64  # columns whose part of e H is computed in one matrix product
SYSTEM_BYTES = 2**26  # of the rows' systems that are solved together
RIDGE = 1e-4  # share of a system's mean diagonal: pulls the scales towards those that they had
FARTHEST = 0.5  # of a scale: more is a group whose codes say nothing


def descend(target: Tensor, solved: QuantizedTensor, hessian: Tensor, damping: float, sweeps: int) -> QuantizedTensor:
    """Sweep over the codes and fit the scales, `sweeps` times; each row's error only falls.

    Args:
        target: float32 [out, in], what the codes stand for.
        hessian: float32 [in, in], mean of x xᵀ.
        damping: share of its mean diagonal added to the diagonal while codes are moved, as GPTQ had it.
    """
    for _ in range(sweeps):
        solved = fit_scales(target, move_codes(target, solved, hessian, damping), hessian)
    return solved


def move_codes(target: Tensor, solved: QuantizedTensor, hessian: Tensor, damping: float) -> QuantizedTensor:
    """One sweep over the columns; those that calibration never excited stay."""
    size = target.shape[1] // solved.groups
    wanted, codes = target.T.contiguous(), solved.codes.T.float().contiguous()  # [in, out]: a column is contiguous
    scales, zeros = solved.scales.float().T.contiguous(), solved.zeros.float().T.contiguous()  # [groups, out]
    group_of = [column // size for column in range(len(wanted))]
    errors = codes.sub(zeros.repeat_interleave(size, 0)).mul_(scales.repeat_interleave(size, 0)).sub_(wanted)
    added = damping * hessian.diagonal().mean()
    diagonal = (hessian.diagonal() + added).tolist()
    alive = (hessian.diagonal() > 0).tolist()
    for start in range(0, len(wanted), BLOCK):
        block = slice(start, start + BLOCK)
        pulls = torch.addmm(errors[block], hessian[block], errors, beta=float(added))  # e H, [columns, out]
        inner = hessian[block, block].contiguous()
        for i in range(len(pulls)):
            k = start + i
            if not alive[k]:
                continue
            scale, zero = scales[group_of[k]], zeros[group_of[k]]
            best = wanted[k] + errors[k] - pulls[i] / diagonal[k]
            codes[k] = (best / scale).round_().add_(zero).clamp_(0, 2**solved.bits - 1)
            error = (codes[k] - zero) * scale - wanted[k]
            pulls[i + 1 :].addr_(inner[i, i + 1 :], error - errors[k])
            errors[k] = error
    moved = codes.T.to(torch.uint8).contiguous()
    return QuantizedTensor(moved, solved.scales, solved.zeros, solved.bits, solved.group_size)


def fit_scales(target: Tensor, solved: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """The same codes with the best scales that runtimes hold; rows that would lose more by them keep theirs."""
    step = max(1, SYSTEM_BYTES // (4 * solved.groups**2))
    parts = [slice(at, at + step) for at in range(0, len(target), step)]
    scales = torch.cat([_fit(target[part], solved.with_rows(itemgetter(part)), hessian) for part in parts])
    fitted = QuantizedTensor(solved.codes, scales, solved.zeros, solved.bits, solved.group_size)
    better = objective(target - fitted.dequantize(), hessian) < objective(target - solved.dequantize(), hessian)
    chosen = torch.where(better.unsqueeze(1), scales, solved.scales)
    return QuantizedTensor(solved.codes, chosen, solved.zeros, solved.bits, solved.group_size)


def _fit(target: Tensor, solved: QuantizedTensor, hessian: Tensor) -> Tensor:
    """float16 [rows, groups]."""
    rows, groups = len(target), solved.groups
    size = target.shape[1] // groups
    codes = solved.codes.float().view(rows, groups, size) - solved.zeros.float().unsqueeze(-1)
    system = target.new_empty(rows, groups, groups)
    for group in range(groups):
        spread = codes[:, group] @ hessian[group * size : (group + 1) * size]  # [rows, in]
        system[:, group] = (spread.view(rows, groups, size) * codes).sum(-1)
    old = solved.scales.float()
    missing = ((target @ hessian).view(rows, groups, size) * codes).sum(-1)  # [rows, groups]
    missing -= (system @ old.unsqueeze(-1)).squeeze(-1)
    ridge = RIDGE * system.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    system.diagonal(dim1=1, dim2=2).add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(system)
    change = torch.cholesky_solve(missing.unsqueeze(-1), lower).squeeze(-1)
    usable = (failed == 0).unsqueeze(1) & change.isfinite() & (change.abs() <= FARTHEST * old.abs())
    return representable(torch.where(usable, old + change, old)).to(torch.float16)
