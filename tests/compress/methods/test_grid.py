"""Grids: every weight within half a step, no surprise from zeros, outliers and tiny values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bluelm.errors import InputError
from compress.methods.grid import LARGEST_SCALE, SMALLEST_SCALE, choose_grid, output_loss
from compress.methods.rtn import round_to_nearest

BITS = (4, 8)


def random_weight(seed: int, rows: int = 5, columns: int = 64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    heavy = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()
    return scale * heavy


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((32, 64, -1)),
    symmetric=st.booleans(),
    exponent=st.integers(-3, 3),
)
def test_rounding_is_within_half_a_step(seed: int, bits: int, group_size: int, symmetric: bool, exponent: int) -> None:
    weight = random_weight(seed, scale=10.0**exponent)
    found = round_to_nearest(weight, bits, group_size, symmetric)
    steps = found.scales.float().abs().repeat_interleave(found.columns_per_group, 1)
    # scales are rounded to 8 significant bits, so that the ends of the span may miss by 2**-8 of it
    slack = 0.5 + (2**bits) * 2.0**-8 + (0.5 if not symmetric else 0)
    assert ((found.dequantize() - weight).abs() <= slack * steps).all()
    assert found.symmetric or not symmetric
    assert int(found.codes.max()) < 2**bits
    assert torch.equal(found.scales.float(), found.scales.to(torch.bfloat16).float())


def test_at_three_bits_the_farther_side_has_four_codes() -> None:
    """Scales of phones' widths are positive; 3 bits are for comparisons, and may have them either way."""
    weight = torch.zeros(2, 32)
    weight[0, :3], weight[1, :3] = torch.tensor([1.0, 0.5, -0.75]), torch.tensor([-1.0, -0.5, 0.75])
    found = round_to_nearest(weight, 3, 32, True)
    assert found.scales.flatten().tolist() == [-0.25, 0.25]
    assert found.symmetric and torch.equal(found.dequantize(), weight)
    assert (round_to_nearest(weight, 4, 32, True).scales > 0).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from(BITS), symmetric=st.booleans())
def test_search_never_loses_more_than_minmax(seed: int, bits: int, symmetric: bool) -> None:
    weight = random_weight(seed)
    plain = choose_grid(weight, bits, 32, symmetric).nearest(weight).dequantize()
    searched = choose_grid(weight, bits, 32, symmetric, search=True).nearest(weight).dequantize()
    lost = (searched - weight).square().view(5, 2, 32).sum(-1)
    assert (lost <= (plain - weight).square().view(5, 2, 32).sum(-1) + 1e-9).all()


@pytest.mark.parametrize("group_size", [32, -1])
def test_search_by_output_loses_less_at_the_output(group_size: int) -> None:
    weight = random_weight(0, rows=32, columns=128)
    x = random_weight(1, rows=400, columns=128) @ random_weight(2, rows=128, columns=128)
    hessian = x.T @ x / 400

    def lost(grid_hessian: Tensor | None, search: bool) -> float:
        grid = choose_grid(weight, 4, group_size, True, search=search, hessian=grid_hessian)
        error = grid.nearest(weight).dequantize() - weight
        return float((error @ hessian * error).sum())

    assert lost(hessian, True) < lost(None, False)


def test_the_search_finds_the_best_of_its_spans() -> None:
    weight = random_weight(3, rows=3, columns=32)
    found = choose_grid(weight, 4, 32, True, search=True)
    best = torch.full((3,), torch.inf)
    for step in range(27):
        span = weight * (1 - step / 40)
        scale = torch.maximum(span.amax(1) / 7, -span.amin(1) / 8).to(torch.bfloat16).to(torch.float32)
        codes = (weight / scale.unsqueeze(1)).round().clamp(-8, 7)
        best = torch.minimum(best, (codes * scale.unsqueeze(1) - weight).square().sum(1))
    torch.testing.assert_close((found.nearest(weight).dequantize() - weight).square().sum(1), best)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_hard_groups(bits: int, search: bool, symmetric: bool) -> None:
    weight = random_weight(0, rows=7)
    weight[0] = 0.0
    weight[1, 3] = 1e4  # an outlier
    weight[2] *= 1e-9  # below what float16 can scale
    weight[4] = 0.25  # constant
    weight[5] = -weight[5].abs()
    found = choose_grid(weight, bits, 32, symmetric, search=search).nearest(weight)
    restored = found.dequantize()
    assert torch.isfinite(restored).all()
    assert ((found.scales >= SMALLEST_SCALE) & (found.scales <= LARGEST_SCALE)).all()
    assert (restored[0] == 0).all()
    assert restored[1, 3] == pytest.approx(1e4, rel=0.01)
    assert (restored[2].abs() <= 2**-24).all()
    torch.testing.assert_close(restored[4], weight[4], rtol=0.01, atol=0)


def test_asymmetric_zero_is_exact() -> None:
    weight = random_weight(0).abs() + 3.0
    weight[:, 0] = 0.0
    restored = round_to_nearest(weight, 4, 32, symmetric=False).dequantize()
    assert (restored[:, 0] == 0).all()


def test_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="group size 48 does not divide 64"):
        choose_grid(random_weight(0), 4, 48, True)


def test_weights_too_large_for_float16_scales_are_refused() -> None:
    weight = random_weight(0)
    weight[1, 1] = -1e6
    with pytest.raises(InputError, match="too large for 4-bit codes"):
        choose_grid(weight, 4, 32, True)
    assert choose_grid(weight, 8, 32, True).nearest(weight).dequantize()[1, 1] == pytest.approx(-1e6, rel=0.01)


def test_rows_are_independent_of_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(0, rows=9)
    whole = choose_grid(weight, 4, 32, False, search=True)
    monkeypatch.setattr("compress.methods.grid.CHUNK", 128)
    parts = choose_grid(weight, 4, 32, False, search=True)
    assert torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.zeros, parts.zeros)


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_weights_that_the_scales_hold_are_taken(bits: int) -> None:
    weight = random_weight(0)
    weight[1, 1] = LARGEST_SCALE * (2 ** (bits - 1) - 1)
    assert choose_grid(weight, bits, 32, True).scales.max() == LARGEST_SCALE
    weight[1, 1] = torch.nextafter(weight[1, 1], torch.tensor(torch.inf))
    with pytest.raises(InputError, match="too large"):
        choose_grid(weight, bits, 32, True)


def test_zero_points_of_negative_groups_stay_within_eight_bits() -> None:
    """Scales are rounded, so that the lowest weight may lie more than 255.5 of them below zero."""
    weight = -torch.rand(500, 16, generator=torch.Generator().manual_seed(0)) - 0.01
    found = choose_grid(weight, 8, 16, False)
    assert (-weight.amin(1) / found.scales.squeeze(1).float()).max() > 255.5
    step = found.scales.float()
    assert ((found.nearest(weight).dequantize() - weight).abs() <= 1.01 * step).all()


@pytest.mark.parametrize("group_size", [2, -1])
def test_the_output_loss_by_hand(group_size: int) -> None:
    hessian = torch.tensor([[2.0, 1, 9, 9], [1, 3, 9, 9], [9, 9, 5, -2], [9, 9, -2, 7]])
    error = torch.tensor([[1.0, 2, 3, 4], [0, 1, 1, 0]]).view(2, 4 // (2 if group_size == 2 else 4), -1)
    wanted = [[2 + 4 + 12, 45 - 48 + 112], [3, 5]] if group_size == 2 else [[2 + 12 + 45 + 112], [8]]
    assert output_loss(hessian, group_size)(error).tolist() == wanted
