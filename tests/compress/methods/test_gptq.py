"""GPTQ against the paper's formulas in float64, its guarantee, and Hessians that are hard."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bluelm.errors import InputError
from calibration.walk import Moments
from compress.layers import solve_stage
from compress.methods.gptq import _one_thread, corrected, factorize, gptq
from compress.methods.grid import Grid, choose_grid
from compress.methods.loss import objective
from compress.methods.rtn import round_to_nearest
from compress.recipe import Recipe, Widths


def problem(seed: int, rows: int = 24, columns: int = 64, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, some channels far stronger than others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / 8
    strength = torch.randn(columns, generator=generator).exp()
    x = torch.randn(tokens, columns, generator=generator) @ mixing * strength
    return weight, x.T @ x / tokens


def paper(weight: Tensor, hessian: Tensor, grid: Grid, damping: float, order: Tensor) -> Tensor:
    """Codes by optimal brain quantization with one order for all rows (arXiv 2210.17323, eq. 2 and 3), float64.

    Column q is rounded; the columns left take up its error by -(w_q - ŵ_q) / [H⁻¹]_qq [H⁻¹]_q,:; then q leaves
    H⁻¹ by one step of Gaussian elimination.
    """
    weight, inverse = weight.double().clone(), hessian.double().clone()
    inverse.diagonal().add_(damping * hessian.double().diagonal().mean())
    inverse = torch.linalg.inv(inverse)
    group = weight.shape[1] // grid.scales.shape[1]
    codes = torch.zeros_like(weight)
    for q in order.tolist():
        scale, zero = grid.scales[:, q // group].double(), grid.zeros[:, q // group].double()
        codes[:, q] = (torch.round(weight[:, q] / scale) + zero).clamp(0, grid.largest_code)
        error = weight[:, q] - (codes[:, q] - zero) * scale
        weight -= torch.outer(error / inverse[q, q], inverse[q])
        inverse -= torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1.0  # gone: its row and column are zero
    return codes.to(torch.uint8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 32, True), (4, -1, False), (8, 32, True)])
def test_codes_are_those_of_the_paper(seed: int, act_order: bool, bits: int, group_size: int, symmetric: bool) -> None:
    weight, hessian = problem(seed)
    grid = choose_grid(weight, bits, group_size, symmetric)
    feedback = factorize(hessian, 0.01, act_order)
    expected_order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(64)
    assert torch.equal(feedback.order, expected_order)
    assert torch.equal(gptq(weight, grid, feedback), paper(weight, hessian, grid, 0.01, feedback.order))


def test_more_columns_than_a_block() -> None:
    weight, hessian = problem(0, rows=8, columns=224, tokens=600)
    grid = choose_grid(weight, 4, 32, True)
    feedback = factorize(hessian)
    found, expected = gptq(weight, grid, feedback), paper(weight, hessian, grid, 0.01, feedback.order)
    assert (found != expected).float().mean() < 0.002  # float32 may round a tie the other way


def test_factorization_is_that_of_the_damped_hessian() -> None:
    _, hessian = problem(1)
    feedback = factorize(hessian, 0.02)
    unit = feedback.upper.double() + torch.eye(64)
    found = unit @ feedback.pivots.double().diag() @ unit.T
    damped = hessian.double() + 0.02 * hessian.double().diagonal().mean() * torch.eye(64)
    expected = damped[feedback.order][:, feedback.order]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    right = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    solution = feedback.solve(right).double()
    torch.testing.assert_close(solution @ damped, right.double(), rtol=0, atol=1e-4)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.sampled_from((1, 10, 300)),
    method=st.sampled_from(("gptq", "awq")),
    bits=st.sampled_from((4, 8)),
    group_size=st.sampled_from((32, -1)),
    symmetric=st.booleans(),
    act_order=st.booleans(),
)
def test_no_row_is_ever_worse_than_rounded_to_nearest(
    seed: int, tokens: int, method: str, bits: int, group_size: int, symmetric: bool, act_order: bool
) -> None:
    weight, hessian = problem(seed, rows=12, tokens=tokens)
    recipe = Recipe.make({"method": method, "act_order": act_order})
    widths = Widths(bits, group_size, symmetric)
    solved = solve_stage({"w": weight}, Moments(hessian), {"w": widths}, recipe)["w"]
    rounded = round_to_nearest(weight, bits, group_size, symmetric)
    loss = objective((weight - solved.weight.dequantize()).double(), hessian.double())
    most = objective((weight - rounded.dequantize()).double(), hessian.double())
    assert (loss <= most * (1 + 1e-4) + 1e-5 * most.mean()).all()


def test_gptq_gains_much_on_correlated_inputs() -> None:
    weight, hessian = problem(0)
    note = solve_stage({"w": weight}, Moments(hessian), {"w": Widths(4, 32, True)}, Recipe())["w"].note
    assert note["loss"] < 0.5 * note["loss_rounding"]
    assert note["damping"] == 0.01
    assert note["factorizations"] == 1


def test_kept_rows_are_counted() -> None:
    # inputs that hardly correlate leave GPTQ little to gain: in some rows rounding is better by chance
    weight, _ = problem(5)
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x / 2000
    solved = solve_stage(
        {"w": weight}, Moments(hessian), {"w": Widths(4, 32, True)}, Recipe.make({"grid": "minmax", "sweeps": 0})
    )
    grid = choose_grid(weight, 4, 32, True)
    alone, rounded = grid.holding(gptq(weight, grid, factorize(hessian))), grid.nearest(weight)
    worse = objective(weight - alone.dequantize(), hessian) > objective(weight - rounded.dequantize(), hessian)
    assert 0 < int(worse.sum()) < len(worse)
    assert solved["w"].note["rows_rounded"] == int(worse.sum())
    assert torch.equal(solved["w"].weight.codes[worse], rounded.codes[worse])
    assert torch.equal(solved["w"].weight.codes[~worse], alone.codes[~worse])


def test_damping_rises_until_the_factorization_holds_and_is_told() -> None:
    weight, hessian = problem(0)
    indefinite = hessian - 0.3 * hessian.diagonal().mean() * torch.eye(64)
    assert torch.linalg.eigvalsh(indefinite).min() < 0
    feedback = factorize(indefinite)
    assert feedback.attempts > 1
    assert feedback.damping == pytest.approx(0.01 * 4 ** (feedback.attempts - 1))
    note = solve_stage({"w": weight}, Moments(indefinite), {"w": Widths(4, 32, True)}, Recipe())["w"].note
    assert note["damping"] == feedback.damping
    assert note["factorizations"] == feedback.attempts


def test_dead_inputs_are_rounded_to_nearest_and_told() -> None:
    weight, hessian = problem(0)
    hessian[5], hessian[:, 5], hessian[40], hessian[:, 40] = 0, 0, 0, 0
    grid = choose_grid(weight, 4, 32, True)
    feedback = factorize(hessian)
    assert feedback.dead == 2
    codes, nearest = gptq(weight, grid, feedback), grid.nearest(weight).codes
    assert torch.equal(codes[:, [5, 40]], nearest[:, [5, 40]])
    assert not torch.equal(codes, nearest)


def test_layer_that_never_fired_is_rounded_to_nearest() -> None:
    weight, _ = problem(0)
    feedback = factorize(torch.zeros(64, 64))
    grid = choose_grid(weight, 4, 32, True)
    assert feedback.dead == 64
    assert torch.equal(gptq(weight, grid, feedback), grid.nearest(weight).codes)


def test_constant_and_equal_inputs_are_no_trouble() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 2.0
    x[:, 4] = 2.0
    x[:, 10] = x[:, 11]
    weight, _ = problem(0)
    note = solve_stage({"w": weight}, Moments(x.T @ x / 200), {"w": Widths(4, 32, True)}, Recipe())["w"].note
    assert note["factorizations"] == 1
    assert note["loss"] < note["loss_rounding"]


def test_outlier_weights_leave_other_groups_alone() -> None:
    weight, hessian = problem(0)
    weight[0, 0] = 1e4
    solved = solve_stage({"w": weight}, Moments(hessian), {"w": Widths(4, 32, True)}, Recipe())["w"].weight
    restored = solved.dequantize()
    assert torch.isfinite(restored).all()
    assert restored[0, 0] == pytest.approx(1e4, rel=0.01)
    assert (restored[1:] - weight[1:]).abs().max() < 2


def test_activations_that_are_not_finite_are_refused() -> None:
    _, hessian = problem(0)
    hessian[2, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        factorize(hessian)


def test_correction_is_the_damped_least_squares_fit() -> None:
    weight, hessian = problem(2)
    generator = torch.Generator().manual_seed(9)
    cross = weight @ hessian + 0.1 * torch.randn(24, 64, generator=generator)
    feedback = factorize(hessian, 0.01)
    found = corrected(weight, Moments(hessian, cross), feedback, 1.0).double()
    ridge = 0.01 * hessian.double().diagonal().mean()
    # gradient of tr((W H - 2 C) Wᵀ) + ridge |W - W0|² is zero at the fit
    gradient = found @ hessian.double() - cross.double() + ridge * (found - weight.double())
    assert gradient.abs().max() < 1e-3 * cross.abs().max()
    half = corrected(weight, Moments(hessian, cross), feedback, 0.5)
    torch.testing.assert_close(half.double(), (found + weight.double()) / 2, rtol=1e-4, atol=1e-4)


def test_wide_layers_are_solved_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(0, rows=40)
    whole = solve_stage({"w": weight}, Moments(hessian), {"w": Widths(4, 32, True)}, Recipe())["w"]
    monkeypatch.setattr("compress.layers.ROWS", 16)
    parts = solve_stage({"w": weight}, Moments(hessian), {"w": Widths(4, 32, True)}, Recipe())["w"]
    assert (whole.weight.codes != parts.weight.codes).float().mean() < 0.002
    assert parts.note["loss"] == pytest.approx(whole.note["loss"], rel=1e-3)


def test_one_attempt_is_made_where_one_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hessian = problem(3)
    monkeypatch.setattr("compress.methods.gptq.ATTEMPTS", 1)
    assert factorize(hessian).attempts == 1


def test_hessians_are_factored_on_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with _one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
