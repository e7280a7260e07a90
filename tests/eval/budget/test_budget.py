"""Budgets: each kind of failure names the figure, the limit and by how much; bounds decide, or say that they cannot."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from eval.budget import budget_file
from eval.budget.budget import Check, judge
from eval.budget.budget_file import DEFAULT_BUDGET
from eval.budget.confidence import (
    LEAST_DOCUMENTS,
    correction,
    enough,
    multiplier,
    sample_of,
    student_quantile,
)
from eval.budget.limits import STRUCTURE, Budget
from eval.measurement import Measurement

GOOD = [
    *(
        Measurement(name, value, "", "measured", error, 4000, subject=subject)
        for subject in ("npu", "cpu")
        for name, value, error in (
            ("perplexity_ratio", 1.001, 0.0003),
            ("mean_kl", 0.002, 0.0001),
            ("p99_kl", 0.02, 0.001),
            ("max_kl", 0.2, 0.02),
            ("top1_agreement", 0.97, 0.001),
            ("top5_agreement", 0.96, 0.001),
            ("mean_kl@zh", 0.003, 0.0001),
            ("prefill_decode_kl", 1e-6, None),
            ("runtime_kl", 1e-6, None),
            *((name, 0, None) for name in STRUCTURE),
            (f"not_known@onnx-{subject}", 0, None),
        )
    ),
    Measurement("decode_tokens_per_s", 12.5, "tokens/s", "estimated", subject="soc"),
    Measurement("decode_tokens_per_s", 300, "tokens/s", "measured", subject="host"),
    Measurement("artifact_bytes", 5e6, "bytes", "measured", subject="files"),
    Measurement("memory_bytes", 9e6, "bytes", "estimated", subject="soc"),
]
LIMITS = {
    "max_perplexity_ratio": (1.02, 1.0, "perplexity_ratio"),
    "max_mean_kl": (0.01, 0.001, "mean_kl"),
    "max_p99_kl": (0.1, 0.01, "p99_kl"),
    "max_max_kl": (0.3, 0.1, "max_kl"),
    "min_top5_agreement": (0.95, 0.97, "top5_agreement"),
    "min_top1_agreement": (0.96, 0.98, "top1_agreement"),
    "max_prefill_decode_kl": (0.001, 1e-7, "prefill_decode_kl"),
    "max_runtime_kl": (1e-5, 1e-7, "runtime_kl"),
    "max_artifact_bytes": (6_000_000, 4_000_000, "artifact_bytes"),
    "max_memory_bytes": (10_000_000, 8_000_000, "memory_bytes"),
}


def failures(budget: Budget, figures: list[Measurement]) -> tuple[Check, ...]:
    return judge(budget, figures, ("npu", "cpu")).failures


@pytest.mark.parametrize("key", LIMITS)
def test_each_limit_passes_fails_and_is_not_measured(key: str) -> None:
    holds, breaks, figure = LIMITS[key]
    assert not failures(Budget.model_validate({key: holds}), GOOD)

    failed = failures(Budget.model_validate({key: breaks}), GOOD)
    value = next(m.value for m in GOOD if m.name == figure)
    assert failed
    assert all(f.value == value and f.limit == breaks and f.name == key for f in failed)
    assert all(f.margin == pytest.approx(-abs(value - breaks)) for f in failed)
    distance = f"{abs(value - breaks) / 1e6:.1f} MB" if "bytes" in key else f"{abs(value - breaks):,.5g}"
    assert f"beyond by {distance}" in str(failed[0])

    missing = failures(Budget.model_validate({key: holds}), [m for m in GOOD if m.name != figure])
    assert missing
    assert all("not measured" in str(f) for f in missing)


def test_accuracy_holds_for_every_artifact() -> None:
    figures = [m for m in GOOD if not (m.name == "mean_kl" and m.subject == "npu")]
    (failed,) = failures(Budget(max_mean_kl=0.01), figures)
    assert (failed.subject, failed.note) == ("npu", "not measured")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_fails(value: float) -> None:
    figures = [Measurement("mean_kl", value, "nats/token", "measured", subject="npu")]
    (failed,) = judge(Budget(max_mean_kl=0.01, structure=False), figures, ("npu",)).failures
    assert str(value) in str(failed)


def test_speed_counts_only_the_accepted_kind() -> None:
    limit = {"at_least": 10, "where": "soc"}
    assert not failures(Budget.model_validate({"min_decode_tokens_per_s": limit | {"accept": "estimated"}}), GOOD)
    (failed,) = failures(Budget.model_validate({"min_decode_tokens_per_s": limit | {"accept": "measured"}}), GOOD)
    assert "not measured (only estimated: 12.5" in str(failed)
    (slow,) = failures(Budget.model_validate({"min_decode_tokens_per_s": {"at_least": 400, "where": "host"}}), GOOD)
    assert "300" in str(slow)
    assert "beyond by 100" in str(slow)
    assert {(one.name, one.subject) for one in (failed, slow)} == {
        ("min_decode_tokens_per_s", "soc"),
        ("min_decode_tokens_per_s", "host"),
    }


SIMULATED = [replace(m, how="emulated", by="a simulator 1.2") if m.subject == "npu" else m for m in GOOD]


@pytest.mark.parametrize("key", [key for key in LIMITS if key.startswith(("max_", "min_"))])
def test_any_limit_may_ask_for_measured_figures(key: str) -> None:
    holds, _, figure = LIMITS[key]
    bound = "at_most" if key.startswith("max_") else "at_least"
    for how in ("emulated", "estimated"):
        figures = [replace(m, how=how, by="a stand-in") if m.name == figure else m for m in GOOD]
        found = Budget.model_validate({key: {bound: holds, "accept": ["measured"]}})
        failed = failures(found, figures)
        assert failed
        assert all(f"not measured (only {how} by a stand-in: " in str(f) for f in failed)
        assert not failures(Budget.model_validate({key: {bound: holds, "accept": [how]}}), figures)
        assert not failures(Budget.model_validate({key: {bound: holds}}), figures)  # the budget accepts all kinds
        assert failures(Budget.model_validate({key: {bound: holds}, "accept": "measured"}), figures)
        own = {
            key: {bound: holds, "accept": how},
            "accept": "measured",
            "two_sided": False,
        }  # the limit's word
        assert not failures(Budget.model_validate(own), figures)


def test_a_budget_that_asks_for_measured_holds_structure_and_two_sides_to_it() -> None:
    strict = Budget(accept=("measured",), structure=True)
    verdict = judge(strict, SIMULATED, ("npu",))
    assert not verdict.passed
    assert {c.name for c in verdict.failures} >= {"not_better_than_float", "not_identical_to_float"}
    assert all("only emulated by a simulator 1.2" in str(c) for c in verdict.failures if c.how == "emulated")


def test_a_check_says_what_stood_in_for_the_phone() -> None:
    (npu, cpu) = judge(Budget(max_mean_kl=0.01, structure=False, two_sided=False), SIMULATED, ("npu", "cpu")).checks
    assert str(npu).endswith("; emulated by a simulator 1.2")
    assert (npu.how, npu.by) == ("emulated", "a simulator 1.2")
    assert "emulated" not in str(cpu)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", list(LIMITS))
def test_no_limit_passes_what_is_no_number(key: str, value: float) -> None:
    holds, _, figure = LIMITS[key]
    figures = [replace(m, value=value, error=math.nan, note="try this") if m.name == figure else m for m in GOOD]
    failed = failures(Budget.model_validate({key: holds}), figures)
    assert failed
    assert all(f"the figure is {value}: try this" in str(f) for f in failed)
    uncertain = [replace(m, error=math.nan) if m.name == figure else m for m in GOOD]
    about = [c for c in failures(Budget.model_validate({key: holds}), uncertain) if c.outcome != "undecided"]
    assert not about  # an error that is no number leaves open what a sample says, and is no error


def test_recovery_is_asked_of_every_task_that_was_run() -> None:
    def task(name: str, *recovery: float) -> list[Measurement]:
        score = Measurement(f"task_score@{name}", 0.4, "", "measured", 0.02, 500, subject="npu")
        value, error = recovery or (0, 0)
        found = Measurement(f"task_recovery@{name}", value, "", "measured", error, 500, subject="npu")
        return [score, found] if recovery else [score]

    budget = Budget(min_task_recovery=0.95, structure=False, two_sided=False)
    none_right = Measurement("task_reference@d", 0, "", "measured", 0, 500, subject="npu")
    figures = [none_right, *task("a", 0.99, 0.01), *task("b", 0.90, 0.01), *task("c", 0.96, 0.02), *task("d")]
    first, second, third, fourth = judge(budget, figures, ("npu", "cpu")).checks
    assert (first.name, first.subject, first.outcome) == ("min_task_recovery@a", "npu", "passed")
    assert second.outcome == "failed"
    assert "beyond by 0.05" in str(second)
    assert third.outcome == "undecided"
    assert third.needed is not None
    assert f"on 500 questions); about {third.needed:,} would do" in str(third)
    assert (fourth.passed, fourth.note) == (False, "not measured: the float model has no right answer")
    (none,) = judge(budget, GOOD, ("npu", "cpu")).checks
    assert str(none) == "min_task_recovery (npu): not measured; the budget asks for at least 0.95"


def test_what_is_not_known_is_not_passed_but_for_formats_that_may() -> None:
    told = [m for m in GOOD if not m.name.startswith("not_known")]
    untold = Measurement("not_known@gguf", 3, "items", "measured", note="rope: nobody reads it", subject="npu")

    def failed(budget: Budget, figures: list[Measurement]) -> list[Check]:
        return [check for check in judge(budget, figures, ("npu",)).failures if check.name == "max_not_known"]

    (asked,) = failed(Budget(accept_not_known=("coreml",)), [*told, untold])
    assert (asked.value, asked.unit, asked.note) == (3, "items", "rope: nobody reads it")
    assert not failed(Budget(accept_not_known=("coreml", "gguf")), [*told, untold])
    assert not failed(Budget(), [*told, untold])
    (missing,) = failed(Budget(accept_not_known=("gguf",)), told)
    assert (missing.unit, missing.note) == ("items", "not measured")


def test_default_budget_is_readable_and_asks_for_everything_that_a_run_measures() -> None:
    budget = budget_file.load(DEFAULT_BUDGET)
    assert budget.max_artifact_bytes == 4_000_000_000
    assert judge(budget, GOOD, ("npu", "cpu")).passed


def one(name: str, value: float, error: float | None, n: int = 4000) -> list[Measurement]:
    return [Measurement(name, value, "", "measured", error, n, subject="npu")]


def hold(key: str, limit: float, figures: list[Measurement], sizes: Sequence[float] = ()) -> Check:
    budget = Budget.model_validate({key: limit, "structure": False, "two_sided": False})
    samples = {"npu": {"": sample_of(sizes)}} if sizes else None
    (check,) = judge(budget, figures, ("npu",), samples).checks
    return check


@pytest.mark.parametrize(("at_most", "limit"), [(True, 1.02), (False, 0.95)])
def test_the_bound_decides_and_between_the_bounds_is_too_few_tokens(at_most: bool, limit: float) -> None:
    key, name = ("max_perplexity_ratio", "perplexity_ratio") if at_most else ("min_top1_agreement", "top1_agreement")
    inside = -1 if at_most else 1
    for far, outcome in ((1.7, "passed"), (1.6, "undecided"), (0, "undecided"), (-1.6, "undecided"), (-1.7, "failed")):
        check = hold(key, limit, one(name, limit + inside * far * 0.001, 0.001))
        assert check.outcome == outcome
        assert check.passed == (outcome == "passed")
        assert ("too few tokens to tell" in str(check)) == (outcome == "undecided")
        assert ("beyond by" in str(check)) == (outcome == "failed")
        assert check.low is not None
        assert check.high is not None
        assert check.low < check.value < check.high  # type: ignore[operator]


def test_how_many_tokens_would_do_do() -> None:
    """At as many tokens as it says, with the error that they would have, the same figure passes."""
    check = hold("max_perplexity_ratio", 1.02, one("perplexity_ratio", 1.0190, 0.002, 4000))
    assert check.needed is not None
    assert f"about {check.needed:,} would do" in str(check)
    error = 0.002 * math.sqrt(4000 / check.needed)
    assert hold("max_perplexity_ratio", 1.02, one("perplexity_ratio", 1.0190, error, check.needed)).passed
    fewer = int(0.9 * check.needed)
    error = 0.002 * math.sqrt(4000 / fewer)
    assert not hold("max_perplexity_ratio", 1.02, one("perplexity_ratio", 1.0190, error, fewer)).passed


def test_what_no_number_of_tokens_tells_is_said() -> None:
    assert "no number would do" in str(hold("max_perplexity_ratio", 1.02, one("perplexity_ratio", 1.02, 0.001)))
    alone = hold("max_perplexity_ratio", 1.02, one("perplexity_ratio", 1.001, None), [4000])
    assert (alone.outcome, alone.passed) == ("undecided", False)
    assert "too few documents to tell: 1 of at least 4" in str(alone)
    assert enough(1, 1, 1 + 1e-12, 1.6, 100) is None


def test_few_documents_and_one_that_outweighs_the_others_widen_the_bounds() -> None:
    """1.8 errors inside are enough of many documents, not of 8, nor where one of 40 holds half of the text."""
    figure = one("mean_kl", 0.0082, 0.001)
    assert hold("max_mean_kl", 0.01, figure).passed
    assert hold("max_mean_kl", 0.01, figure, [100.0] * 40).passed
    few = hold("max_mean_kl", 0.01, figure, [500.0] * 8)
    assert few.outcome == "undecided"
    assert "on 4,000 tokens of 8 documents" in str(few)
    assert hold("max_mean_kl", 0.01, figure, [3900.0] + [100.0] * 39).outcome == "undecided"


def test_fewer_documents_than_a_bound_takes_decide_nothing() -> None:
    for error in (0.0, 1e-9):
        check = hold("max_mean_kl", 0.01, one("mean_kl", 0.001, error), [500.0] * (LEAST_DOCUMENTS - 1))
        assert (check.outcome, check.low, check.high) == ("undecided", None, None)
        assert "too few documents to tell: 3 of at least 4" in str(check)


def test_degrees_of_freedom() -> None:
    """Equal documents are worth one less than they are; the formula equals the matrices that it stands for."""
    assert sample_of([7] * 12).documents == 12
    assert sample_of([7] * 12).freedom == pytest.approx(11)
    assert sample_of([5]).freedom == 0
    assert 1 <= sample_of([1e6, *[1] * 50]).freedom < 1.001
    sizes = np.random.default_rng(0).integers(1, 400, 17).astype(float)
    w = sizes / sizes.sum()
    m = np.eye(17) - np.outer(np.ones(17), w)
    b = m.T @ np.diag(correction(w) * w**2) @ m
    assert sample_of(sizes).freedom == pytest.approx(np.trace(b) ** 2 / np.trace(b @ b))
    for level, freedom, table in ((0.95, 2.5, 2.92), (0.95, 1.2, 6.314), (0.95, 10.5, 1.804)):
        assert student_quantile(level, freedom) == pytest.approx(table, rel=0.01)


@pytest.mark.parametrize(
    ("level", "freedom", "table"),
    [(0.95, 1, 6.314), (0.95, 2, 2.920), (0.95, 3, 2.353), (0.95, 10, 1.812), (0.999, 30, 3.385), (0.999, 4, 7.173)],
)
def test_quantiles_are_those_of_the_printed_table(level: float, freedom: int, table: float) -> None:
    assert student_quantile(level, freedom) == pytest.approx(table, rel=0.01)
    assert multiplier(0.95) == pytest.approx(1.645, abs=1e-3)
    assert multiplier(0.95, 0) == math.inf


def test_the_gate_errs_as_rarely_as_it_says() -> None:
    """Of figures drawn around a truth that lies on the limit, 5 % pass and 5 % fail."""
    generator = np.random.default_rng(0)
    outcomes = [
        hold(
            "max_mean_kl", 1.0, one("mean_kl", values.mean(), values.std(ddof=1) / math.sqrt(12)), [300.0] * 12
        ).outcome
        for values in generator.normal(1.0, 0.2, (3000, 12))
    ]
    assert outcomes.count("passed") / 3000 == pytest.approx(0.05, abs=0.015)
    assert outcomes.count("failed") / 3000 == pytest.approx(0.05, abs=0.015)


def test_better_than_float_and_identical_to_it_are_flagged() -> None:
    budget = Budget(max_memory_bytes=None, structure=False)

    def flags(ratio: float, error: float, kl: float) -> list[str]:
        figures = one("perplexity_ratio", ratio, error) + one("mean_kl", kl, 1e-5)
        return [f.name for f in judge(budget, figures, ("npu",)).failures]

    assert flags(1.001, 0.0004, 0.001) == []
    assert flags(0.9995, 0.0004, 0.001) == []  # luck
    assert flags(0.98, 0.0004, 0.001) == ["not_better_than_float"]
    assert flags(1.0, 0.0, 0.0) == ["not_identical_to_float"]
    assert judge(budget.model_copy(update={"two_sided": False}), one("mean_kl", 0, 0), ("npu",)).passed


def test_nothing_may_be_beyond_what_its_format_costs() -> None:
    assert {limit for name, (limit, _) in STRUCTURE.items() if name.endswith(("_excess", "_to_guess"))} == {1}
    assert {
        limit for name, (limit, _) in STRUCTURE.items() if name.endswith(("_mismatches", "_faults", "missing"))
    } == {0}


def test_structure_is_always_asked_for() -> None:
    for name, (limit, required) in STRUCTURE.items():
        figures = [m for m in GOOD if m.name != name]
        broken = [*figures, Measurement(name, limit + 0.5, "", "measured", note="why", subject="cpu")]
        assert [(f.name, f.subject) for f in failures(Budget(max_mean_kl=1), broken) if f.value] == [
            (f"max_{name}", "cpu")
        ]
        assert bool(failures(Budget(max_mean_kl=1), figures)) == required  # not measured is no pass
    own_limit = Budget(max_runtime_kl=1e-3)
    broken = [*GOOD, Measurement("runtime_kl_excess", 2, "", "measured", subject="cpu")]
    assert not failures(own_limit, broken)
    assert not failures(Budget(max_mean_kl=1, structure=False), [m for m in GOOD if m.name not in STRUCTURE])


def test_limits_by_domain() -> None:
    budget = Budget.model_validate({"domains": {"zh": {"max_mean_kl": 0.004}, "code": {"max_mean_kl": 0.004}}})
    failed = failures(budget, GOOD)
    assert [(f.name, f.note) for f in failed] == [("max_mean_kl@code", "not measured")] * 2
    tight = Budget.model_validate({"domains": {"zh": {"max_mean_kl": 0.001}}})
    assert [f.name for f in failures(tight, GOOD)] == ["max_mean_kl@zh"] * 2
