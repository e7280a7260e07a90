"""A limit on answers that failed says which part of the loss is whose, and what lowers it."""

from __future__ import annotations

import pytest

from eval.budget.budget import judge
from eval.budget.limits import Budget
from eval.measurement import Measurement


def told(budget: Budget, kl: float, own: float | None, ratio: float = 1.2) -> list[str]:
    figures = [Measurement("mean_kl", kl, "nats/token", "measured", 0.0, 9000, subject="cpu")]
    figures.append(Measurement("perplexity_ratio", ratio, "", "measured", 0.0, 9000, subject="cpu"))
    if own is not None:
        figures.append(Measurement("runtime_kl", own, "nats/token", "measured", None, 9000, subject="cpu"))
    return [str(check) for check in judge(budget, figures, ("cpu",)).failures]


def limits(**more: object) -> Budget:
    return Budget.model_validate({"structure": False, "two_sided": False, **more})


def test_weights_that_cost_too_much_need_bits() -> None:
    (kl,) = told(limits(max_mean_kl=0.05), 0.13, 0.004)
    assert "of 0.13 nats a token the runtime's arithmetic costs 0.004 at most, the weights the rest" in kl
    assert "--bits auto --max-kl 0.04, --bits 8" in kl
    (ratio,) = told(limits(max_perplexity_ratio=1.1), 0.13, 0.004)
    assert "--bits auto --max-kl 0.08" in ratio  # 0.8 ln 1.1


def test_arithmetic_that_costs_too_much_needs_no_bits() -> None:
    (kl,) = told(limits(max_mean_kl=0.05), 0.13, 0.1)
    assert "finer activations help" in kl and "--bits" not in kl


@pytest.mark.parametrize(("budget", "own"), [({"max_mean_kl": 0.05}, None), ({"max_artifact_bytes": 1}, 0.1)])
def test_nothing_is_advised_that_was_not_measured_or_asked(budget: dict[str, float], own: float | None) -> None:
    assert not any("help" in line for line in told(limits(**budget), 0.13, own))


def test_a_limit_that_holds_advises_nothing() -> None:
    assert not told(limits(max_mean_kl=0.2), 0.13, 0.1)
