"""What each key of a budget limits, and where exactly: a figure on the limit passes, one just beyond fails."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from eval.budget.budget import Check, judge
from eval.budget.confidence import Sample
from eval.budget.limits import LIMITS, AtMost, Budget, number_of
from eval.measurement import How, Measurement

DRAWN = {  # from a sample of text: held by their bounds
    "max_perplexity_ratio": ("perplexity_ratio", ""),
    "max_mean_kl": ("mean_kl", "nats/token"),
    "max_p99_kl": ("p99_kl", "nats/token"),
    "max_max_kl": ("max_kl", "nats/token"),
    "min_top1_agreement": ("top1_agreement", ""),
    "min_top5_agreement": ("top5_agreement", ""),
    "min_first_divergence": ("first_divergence", "tokens"),
}
COUNTED = {  # of one subject, or of every artifact
    "max_prefill_decode_kl": ("prefill_decode_kl", "nats/token", "npu"),
    "max_runtime_kl": ("runtime_kl", "nats/token", "npu"),
    "min_prefill_coverage": ("prefill_coverage", "", "npu"),
    "min_decode_coverage": ("decode_coverage", "", "npu"),
    "max_artifact_bytes": ("artifact_bytes", "bytes", "files"),
    "max_memory_bytes": ("memory_bytes", "bytes", "soc"),
    "min_npu_node_share": ("npu_node_share", "", "npu"),
    "min_npu_mac_share": ("npu_mac_share", "", "npu"),
}
ALWAYS = {  # figures that no budget sets: the largest that passes, and whether an artifact without it fails
    "tokenizer_mismatches": (0, True),
    "chat_template_mismatches": (0, True),
    "end_token_faults": (0, True),
    "versions_missing": (0, True),
    "files_changed": (0, False),
    "weight_mismatches": (0, False),
    "bits_per_weight_deviation": (0.02, False),
    "block_error_excess": (1, False),
    "runtime_kl_excess": (1, False),
    "position_kl_excess": (1, False),
    "reference_to_guess": (1, False),
    "runner_refusals": (0, False),
    "runner_token_mismatches": (0, False),
    "runner_chat_mismatches": (0, False),
    "runner_end_faults": (0, False),
    "runner_kl_excess": (1, False),
}


def figure(name: str, value: float, error: float | None = None, how: How = "measured", **more: object) -> Measurement:
    return Measurement(name, value, "", how, error, 4000, **{"subject": "npu", **more})  # type: ignore[arg-type]


def checks(budget: Mapping[str, object], *figures: Measurement, sample: Sample | None = None) -> tuple[Check, ...]:
    given = Budget.model_validate({"structure": False, "two_sided": False, **budget})
    return judge(given, figures, ("npu",), {"npu": {"": sample}} if sample else None).checks


def test_every_key_of_a_budget_limits_a_figure_and_is_tried_here() -> None:
    """A key without a row of `LIMITS` would never be checked; two have a way of their own."""
    keys = {key for key in Budget.model_fields if key.startswith(("max_", "min_"))}
    assert keys == LIMITS.keys() | {"min_decode_tokens_per_s", "min_task_recovery"}
    assert LIMITS.keys() == DRAWN.keys() | COUNTED.keys()


@pytest.mark.parametrize("key", DRAWN)
def test_drawn_figures_are_held_by_their_bounds(key: str) -> None:
    name, unit = DRAWN[key]
    limit, inside = 0.5, -1 if key.startswith("max") else 1
    for away, error, outcome in (
        (0.002, 0.001, "passed"),
        (0.001, 0.001, "undecided"),
        (-0.001, 0.001, "undecided"),
        (-0.002, 0.001, "failed"),
        (0.002, None, "undecided"),
        (0, 0.0, "passed"),
        (-1e-9, 0.0, "failed"),
        (0.2, 1e-6, "passed"),
        (-0.2, 1e-6, "failed"),
    ):
        (found,) = checks({key: limit}, figure(name, limit + inside * away, error))
        assert (found.name, found.subject, found.unit, found.limit) == (key, "npu", unit, limit)
        assert found.outcome == outcome, (away, error)
        assert found.margin == pytest.approx(away)


@pytest.mark.parametrize("key", COUNTED)
def test_counted_figures_are_held_as_they_are(key: str) -> None:
    name, unit, subject = COUNTED[key]
    limit, inside = (1000, -1) if key.endswith("bytes") else (0.5, -1 if key.startswith("max") else 1)
    for away, outcome in ((0, "passed"), (0.2, "passed"), (-1e-6, "failed"), (-0.2, "failed")):
        (found,) = checks({key: limit}, figure(name, limit + inside * away, subject=subject))
        assert (found.subject, found.unit, found.limit, found.outcome) == (subject, unit, limit, outcome)
        assert found.margin == pytest.approx(away)
        assert found.passed == (outcome == "passed")


def test_a_limit_s_number_in_either_form() -> None:
    assert number_of(0.25) == 0.25
    assert number_of(AtMost(at_most=0.5, accept=("measured",))) == 0.5


def test_what_every_artifact_must_reach() -> None:
    good = {name: figure(name, limit) for name, (limit, _) in ALWAYS.items()}
    asked = {"structure": True}
    assert {check.name for check in checks(asked, *good.values())} == {f"max_{name}" for name in good}
    assert all(check.passed for check in checks(asked, *good.values()))
    for name, (limit, required) in ALWAYS.items():
        beyond = figure(name, limit + (0.001 if limit else 1), note="why")
        (failed,) = [c for c in checks(asked, *{**good, name: beyond}.values()) if not c.passed]
        assert (failed.name, failed.limit, failed.note) == (f"max_{name}", limit, "why")
        missing = [c for c in checks(asked, *(m for m in good.values() if m.name != name)) if not c.passed]
        assert [c.note for c in missing] == (["not measured"] if required else [])


def test_a_runner_that_is_required_must_have_judged() -> None:
    (missing,) = checks({"require_runner": True})
    assert (missing.name, missing.passed, missing.note) == ("require_runner", False, "not judged in its runner")
    assert not checks({"require_runner": True}, figure("runner_refusals", 0)) and not checks({"require_runner": False})


def test_from_where_an_artifact_is_not_identical_to_the_float_model() -> None:
    for kl, passed in ((0, False), (0.9e-9, False), (1e-9, False), (1.1e-9, True), (1e-3, True)):
        (found,) = checks({"two_sided": True}, figure("mean_kl", kl, 1e-5))
        assert (found.name, found.limit, found.passed) == ("not_identical_to_float", 1e-9, passed)
        assert found.margin == pytest.approx(kl - 1e-9)
        assert ("exactly as the float model" in found.note) != passed


def test_from_where_an_artifact_is_better_than_the_float_model() -> None:
    """3.09 errors (0.999) of many documents, 4.03 of eleven, and what the KL says may be luck."""

    def passed(ratio: float, kl: float | None = None, sample: Sample | None = None, error: float = 0.01) -> bool:
        figures = [figure("perplexity_ratio", ratio, error), *([] if kl is None else [figure("mean_kl", kl, 0)])]
        found = checks({"two_sided": True}, *figures, sample=sample)[0]
        assert (found.name, found.limit, found.value) == ("not_better_than_float", 1, ratio)
        assert found.margin == pytest.approx(ratio - 1)
        assert found.outcome == ("passed" if found.passed else "failed")
        return found.passed

    assert [passed(1 - 0.01 * far) for far in (3.0, 3.2)] == [True, False]
    assert [passed(1 - 0.01 * far, sample=Sample(11, 10)) for far in (4.0, 4.3)] == [True, False]
    assert [passed(0.98, kl, error=0) for kl in (0.021, 0.019)] == [True, False]
    assert passed(1, error=0)


@pytest.mark.parametrize(("check", "line"), [
    (Check("max_mean_kl", "npu", 0.002, "nats/token", 0.01, 0.008, True),
     "max_mean_kl (npu): 0.002 nats/token, at most 0.01 nats/token"),
    (Check("max_mean_kl", "npu", 0.012, "nats/token", 0.01, -0.002, False, outcome="failed", note="so"),
     "max_mean_kl (npu): 0.012 nats/token, at most 0.01 nats/token: beyond by 0.002 nats/token (20.0%); so"),
    (Check("max_files_changed", "npu", 3, "", 0, -3, False, outcome="failed"),
     "max_files_changed (npu): 3, at most 0: beyond by 3"),
    (Check("min_top1_agreement", "npu", 0.9, "", 0.95, -0.05, False, outcome="undecided", note="too few"),
     "min_top1_agreement (npu): 0.9, at least 0.95: too few"),
    (Check("max_memory_bytes", "soc", 2.5e9, "bytes", 4e9, 1.5e9, True, how="estimated", by="a model"),
     "max_memory_bytes (soc): 2,500.0 MB, at most 4,000.0 MB; estimated by a model"),
    (Check("max_memory_bytes", "soc", 2.5e9, "bytes", 4e9, 1.5e9, True, how="estimated"),
     "max_memory_bytes (soc): 2,500.0 MB, at most 4,000.0 MB; estimated"),
    (Check("max_memory_bytes", "soc", None, "bytes", 4e9, None, False, how="estimated", note="not measured"),
     "max_memory_bytes (soc): not measured; the budget asks for at most 4,000.0 MB"),
    (Check("not_identical_to_float", "npu", 0.0, "nats", 1e-9, 0, False, note="is it quantized?"),
     "not_identical_to_float (npu): is it quantized?"),
    (Check("not_identical_to_float", "npu", 0.5, "nats", 1e-9, 0, True), "not_identical_to_float (npu): 0.5 nats"),
])  # fmt: skip
def test_a_check_in_words(check: Check, line: str) -> None:
    assert str(check) == line


def test_speed_is_held_by_the_lower_end_of_its_interval() -> None:
    speed = {"min_decode_tokens_per_s": {"at_least": 10, "where": "host"}}
    for value, low, outcome, word in ((10, None, "passed", ""), (9.99, None, "failed", ""),
                                      (11, 10, "passed", "lower end"), (11, 9.9, "failed", "lower end")):  # fmt: skip
        (found,) = checks(speed, figure("decode_tokens_per_s", value, subject="host", low=low))
        assert (found.outcome, found.passed) == (outcome, outcome == "passed")
        assert (found.value, found.limit) == (value if low is None else low, 10)
        assert bool(found.note) == bool(word)
        assert word in found.note
    (absent,) = checks(speed, figure("decode_tokens_per_s", 99, how="estimated", subject="host", by="a model"))
    assert (absent.passed, absent.value) == (False, None)
    assert absent.note == "not measured (only estimated by a model: 99)"
