"""Coordinate descent behind GPTQ: errors only fall, no single step is left to take, scales are least squares."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.walk import Moments
from compress.checkpoint.quantized import QuantizedTensor
from compress.layers import solve_stage
from compress.methods.descent import _fit, descend, fit_scales, move_codes
from compress.methods.grid import choose_grid, representable
from compress.methods.loss import objective
from compress.recipe import Recipe, Widths


def case(seed: int, rows: int = 12, columns: int = 128, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight, x.T @ x / tokens


def rounded(weight: Tensor, bits: int, size: int, symmetric: bool) -> QuantizedTensor:
    return choose_grid(weight, bits, size, symmetric).nearest(weight)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from((3, 4)),
    size=st.sampled_from((32, 64, -1)),
    symmetric=st.booleans(),
)
def test_no_row_gets_worse(seed: int, bits: int, size: int, symmetric: bool) -> None:
    weight, hessian = case(seed)
    start = rounded(weight, bits, size, symmetric)
    lost = [objective(weight - start.dequantize(), hessian)]
    moved = move_codes(weight, start, hessian, 0.0)
    lost.append(objective(weight - moved.dequantize(), hessian))
    fitted = fit_scales(weight, moved, hessian)
    lost.append(objective(weight - fitted.dequantize(), hessian))
    for before, after in pairwise(lost):
        assert (after <= before * (1 + 1e-4)).all()
    assert lost[-1].sum() < 0.9 * lost[0].sum()
    assert int(moved.codes.max()) < 2**bits
    assert torch.equal(fitted.zeros, start.zeros)
    assert torch.equal(fitted.scales.float(), representable(fitted.scales.float()))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_quiet_inputs_count_as_loud_ones_do(damping: float) -> None:
    """Powers of two change no digit: what is moved depends on what the inputs are to each other."""
    weight, hessian = case(2)
    hessian[:, 5] = hessian[5] = 0  # never excited
    start = rounded(weight, 4, 32, False)
    loud = move_codes(weight, start, hessian, damping)
    assert not torch.equal(loud.codes, start.codes) and torch.equal(loud.codes[:, 5], start.codes[:, 5])
    for power in (-40, -12, 12):
        assert torch.equal(move_codes(weight, start, hessian * 2.0**power, damping).codes, loud.codes)


def test_no_single_code_is_left_to_move() -> None:
    weight, hessian = case(1, rows=3, columns=64)
    found = rounded(weight, 4, 32, True)
    for _ in range(60):
        found = move_codes(weight, found, hessian, 0.0)
    least = objective((weight - found.dequantize()).double(), hessian.double())
    for column in range(64):
        for step in (-1, 1):
            codes = found.codes.int()
            codes[:, column] = (codes[:, column] + step).clamp(0, 15)
            other = QuantizedTensor(codes.to(torch.uint8), found.scales, found.zeros, 4, 32)
            assert (objective((weight - other.dequantize()).double(), hessian.double()) >= least * (1 - 1e-5)).all()


def test_scales_are_the_least_squares_solution() -> None:
    weight, hessian = case(2)
    start = rounded(weight, 4, 32, False)
    fitted = fit_scales(weight, start, hessian)
    root = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(128))  # H = R Rᵀ
    codes = (start.codes.double().view(12, 4, 32) - start.zeros.double().unsqueeze(-1)).unsqueeze(2)
    for row in range(12):
        columns = (torch.eye(4).double().unsqueeze(-1) * codes[row].squeeze(1).unsqueeze(0)).view(4, 128) @ root
        best = torch.linalg.lstsq(columns.T, (weight[row].double() @ root).unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(fitted.scales[row].double(), best, rtol=0.01, atol=1e-4)


def test_columns_without_signal_and_empty_groups_stay() -> None:
    weight, hessian = case(3)
    hessian[5], hessian[:, 5] = 0, 0
    hessian[32:64], hessian[:, 32:64] = 0, 0  # a whole group never fired
    start = rounded(weight, 4, 32, True)
    found = descend(weight, start, hessian, 0.01, 3)
    assert torch.equal(found.codes[:, 5], start.codes[:, 5])
    assert torch.equal(found.codes[:, 32:64], start.codes[:, 32:64])
    torch.testing.assert_close(found.scales[:, 1], start.scales[:, 1])
    nothing = descend(weight, start, torch.zeros(128, 128), 0.01, 2)
    assert torch.equal(nothing.codes, start.codes) and torch.equal(nothing.scales, start.scales)


def test_outliers_stay_finite() -> None:
    weight, hessian = case(4)
    weight[0, 3], weight[1, 40] = 1e4, -1e4
    found = descend(weight, rounded(weight, 4, 32, True), hessian * 1e8, 0.01, 3)
    assert torch.isfinite(found.scales.float()).all()
    assert (found.scales > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_gains_by_it(symmetric: bool) -> None:
    weight, hessian = case(5, rows=64)
    lost = {
        sweeps: solve_stage(
            {"w": weight}, Moments(hessian), {"w": Widths(4, 32, symmetric)}, Recipe.make({"sweeps": sweeps})
        )["w"].note["loss"]
        for sweeps in (0, 4)
    }
    assert lost[4] < 0.95 * lost[0]


def swept(target: Tensor, start: QuantizedTensor, hessian: Tensor, damping: float, size: int) -> Tensor:
    """One sweep by the formula, code by code in float64: the nearest to t - sum_{j != k} e_j H_jk / H_kk."""
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    codes = start.codes.double()
    scales = start.scales.double().repeat_interleave(size, 1)
    zeros = start.zeros.double().repeat_interleave(size, 1)
    for k in range(target.shape[1]):
        errors = (codes - zeros) * scales - target
        others = errors @ damped[:, k] - errors[:, k] * damped[k, k]
        best = (target[:, k] - others / damped[k, k]) / scales[:, k] + zeros[:, k]
        codes[:, k] = best.round().clamp(0, 2**start.bits - 1)
    return codes


@pytest.mark.parametrize(("bits", "damping"), [(4, 0.0), (4, 0.5), (3, 0.1), (8, 0.1)])
def test_a_sweep_is_the_formula(bits: int, damping: float) -> None:
    """100 columns: a whole block and a part of one; the odd code that float32 rounds the other way is let go."""
    weight, hessian = case(6, rows=8, columns=100)
    hessian /= 1000  # inputs that are small count too
    start = rounded(weight, bits, 20, False)
    found, wanted = move_codes(weight, start, hessian, damping), swept(weight, start, hessian, damping, 20)
    assert (found.codes != wanted).double().mean() < 0.01
    assert (start.codes != wanted).double().mean() > 0.05


def test_rows_that_lose_by_their_new_scales_keep_the_old_ones() -> None:
    """The best scales are rounded to 8 bits, group by group; now and then a neighbour of one of them is better."""
    weight, hessian = case(7, rows=4000)
    best = fit_scales(weight, rounded(weight, 4, 16, True), hessian)
    groups = torch.randint(0, 8, (4000,), generator=torch.Generator().manual_seed(7))
    scales = best.scales.float()
    scales[torch.arange(4000), groups] *= 1 + 2.0**-7
    start = QuantizedTensor(best.codes, representable(scales).to(torch.float16), best.zeros, 4, 16)
    raw = QuantizedTensor(start.codes, _fit(weight, start, hessian), start.zeros, 4, 16)
    before, without = (objective(weight - one.dequantize(), hessian) for one in (start, raw))
    worse = without > before
    assert 5 < worse.sum() < 3995
    found = fit_scales(weight, start, hessian)
    assert torch.equal(found.scales[worse], start.scales[worse])
    assert torch.equal(found.scales[without < before], raw.scales[without < before])


def test_scales_move_by_half_at_most() -> None:
    """Codes times 1.3 of their scale are found again, those times three are no longer what the scale was chosen for."""
    _, hessian = case(8)
    codes = torch.randint(0, 16, (3, 128), generator=torch.Generator().manual_seed(8)).to(torch.uint8)
    scale = torch.full((3, 4), 2.0**-6, dtype=torch.float16)
    start = QuantizedTensor(codes, scale, torch.full((3, 4), 8, dtype=torch.uint8), 4, 32)
    target = start.dequantize() * torch.tensor([[1.3], [3.0], [0.4]])
    found = fit_scales(target, start, hessian).scales.float() / 2.0**-6
    torch.testing.assert_close(found[0], torch.full((4,), 1.3), rtol=0.01, atol=0)
    assert (found[1:] == 1).all()


def test_a_row_s_scales_do_not_depend_on_other_rows() -> None:
    weight, hessian = case(9, rows=3)
    weight *= torch.tensor([[1e-3], [1.0], [1e3]])
    start = rounded(weight, 4, 32, True)
    together = fit_scales(weight, start, hessian).scales
    for row in range(3):
        part = slice(row, row + 1)
        alone = QuantizedTensor(start.codes[part], start.scales[part], start.zeros[part], 4, 32)
        assert torch.equal(fit_scales(weight[part], alone, hessian).scales, together[part])


def test_the_ridge_pulls_the_scales_towards_those_they_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """(M + r I) change = b - M s in float64, for a ridge of the size of the system instead of one of a 10,000th."""
    monkeypatch.setattr("compress.methods.descent.RIDGE", 1.0)
    weight, hessian = case(10, rows=4)
    start = rounded(weight, 4, 32, True)
    codes = (start.codes.double() - 8).view(4, 4, 32)
    old = start.scales.double()
    for row, found in enumerate(_fit(weight, start, hessian).double()):
        spread = torch.block_diag(*codes[row].unsqueeze(1))  # [groups, in]
        system = spread @ hessian.double() @ spread.T
        missing = spread @ hessian.double() @ weight[row].double() - system @ old[row]
        change = torch.linalg.solve(system + system.diagonal().mean() * torch.eye(4), missing)
        torch.testing.assert_close(found, old[row] + change, rtol=2.0**-8, atol=0)
