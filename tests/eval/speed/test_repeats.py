"""Repeats: intervals with known confidence, noise that is told, and the host's speed by a clock of ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.budget.budget import judge
from eval.budget.limits import Budget
from eval.speed.repeats import Repeats
from eval.speed.speed import host_speed
from targets.runtime import RuntimeBase


def test_five_repeats_reach_from_the_smallest_to_the_largest_with_93_75_percent():
    repeats = Repeats((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (repeats.median, repeats.interval) == (3.0, (1.0, 5.0))
    assert repeats.confidence == pytest.approx(1 - 2 * 0.5**5)


@pytest.mark.parametrize(("count", "outside"), [(5, 0), (7, 0), (8, 1), (10, 1), (11, 2), (20, 5)])
def test_how_many_may_be_dropped_at_each_end(count, outside):
    """Conover's table of the sign test at 90 %: n = 8 drops one, n = 11 two, n = 20 five at each end."""
    values = tuple(float(v) for v in range(count))
    assert Repeats(values).interval == (float(outside), float(count - 1 - outside))
    assert Repeats(values).confidence >= 0.90


@pytest.mark.parametrize("count", [5, 9, 15])
def test_the_interval_holds_the_true_median_as_often_as_it_says(count):
    """Skewed noise, as a busy machine makes it; the true median of exp is ln 2."""
    generator = np.random.default_rng(3)
    taken = [Repeats(tuple(generator.exponential(size=count).tolist())) for _ in range(4000)]
    held = [repeats.interval[0] <= np.log(2) <= repeats.interval[1] for repeats in taken]
    assert np.mean(held) == pytest.approx(taken[0].confidence, abs=0.015)


@given(st.lists(st.floats(0.1, 1e6), min_size=5, max_size=40))
def test_the_interval_surrounds_the_median(values):
    low, high = Repeats(tuple(values)).interval
    assert low <= Repeats(tuple(values)).median <= high


def test_four_repeats_are_too_few():
    with pytest.raises(ValueError, match="at least 5"):
        Repeats((1.0,) * 4)


@pytest.mark.parametrize(("last", "told"), [(104.0, "agree within 4.0%"), (110.0, "noisy machine")])
def test_repeats_that_differ_by_more_than_five_percent_are_told(last, told):
    figure = Repeats((100.0, 100.0, 100.0, 100.0, last)).measurement("x", "tokens/s", "measured", "host")
    assert told in figure.note
    assert f"interval 100 to {last:g}" in figure.note
    assert (figure.low, figure.high) == (100.0, last)


class Steady(RuntimeBase):
    """A runtime on its own clock: 1 ms a prefilled token, (10 + depth / 100) ms a decoded one."""

    name, vocab_size, context = "steady", 8, 512

    def __init__(self, jitter: Sequence[float] = (1.0,)) -> None:
        self.now, self.depth, self.turn, self.jitter = 0.0, 0, 0, jitter

    def reset(self) -> None:
        self.depth = 0
        self.turn += 1

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self.now += 0.001 * len(tokens)
        self.depth += len(tokens)
        return np.zeros((len(tokens), 8), np.float32)

    def decode(self, token: int) -> np.ndarray:
        self.now += (0.010 + self.depth / 1e5) * self.jitter[self.turn % len(self.jitter)]
        self.depth += 1
        return np.zeros(8, np.float32)


def test_host_speed_by_a_known_clock():
    runtime = Steady()
    figures = host_speed(runtime, [1] * 100, decode_steps=10, depths=(400, 511), clock=lambda: runtime.now)
    found = {m.name: m for m in figures}
    assert found["prefill_tokens_per_s"].value == pytest.approx(1000)
    assert found["first_token_s"].value == pytest.approx(0.1)
    assert found["decode_tokens_per_s"].value == pytest.approx(10 / sum(0.010 + (100 + i) / 1e5 for i in range(10)))
    assert found["decode_tokens_per_s@400"].value == pytest.approx(10 / sum(0.010 + (400 + i) / 1e5 for i in range(10)))
    assert "decode_tokens_per_s@511" not in found  # no room for ten more
    assert found["speed_peak_memory_bytes"].value > 1e6
    assert all(m.how == "measured" and m.subject == "host" for m in figures)
    assert "agree within 0.0%" in found["decode_tokens_per_s"].note


def test_the_warm_up_does_not_count():
    slow_first = Steady(jitter=(1.0, 50.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    figures = host_speed(slow_first, [1] * 10, decode_steps=10, clock=lambda: slow_first.now)
    decode = next(m for m in figures if m.name == "decode_tokens_per_s")
    assert "agree within 0.0%" in decode.note


def test_the_gate_takes_the_lower_end_on_a_noisy_host():
    noisy = Steady(jitter=(1.0, 1.0, 1.3, 1.0, 0.9, 1.2, 1.0))
    figures = host_speed(noisy, [1] * 100, decode_steps=10, clock=lambda: noisy.now)
    decode = next(m for m in figures if m.name == "decode_tokens_per_s")
    assert "a noisy machine" in decode.note
    between = (decode.value + (decode.low or 0)) / 2
    limit = {"at_least": between, "where": "host"}
    assert not judge(Budget.model_validate({"min_decode_tokens_per_s": limit}), figures, ()).passed
    limit["at_least"] = (decode.low or 0) * 0.999
    assert judge(Budget.model_validate({"min_decode_tokens_per_s": limit}), figures, ()).passed


@pytest.mark.parametrize(("accept", "passed"), [(["measured"], False), (["measured", "estimated"], True)])
def test_a_budget_says_which_kind_of_figure_it_accepts(accept, passed):
    from eval.speed.speed_model import as_measurement, default_work, estimate, find_shape, find_soc

    load = default_work(find_shape("BlueLM-1B"), 4, "npu", 512)
    figure = as_measurement("decode", estimate("decode", load, find_soc("SM8650"), "npu", runtime="QNN"))
    budget = Budget.model_validate({"min_decode_tokens_per_s": {"at_least": 20, "accept": accept}})
    verdict = judge(budget, [figure], ())
    assert verdict.passed is passed
    assert not judge(budget, [], ()).passed  # no figure never passes
