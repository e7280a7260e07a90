"""Budgets: each kind of failure names the figure, the limit and by how much."""

import math
from pathlib import Path

import pytest

from bluelm.errors import InputError
from eval.budget import DEFAULT_BUDGET, Budget, Check, judge
from eval.measurement import Measurement

GOOD = [
    *(
        Measurement(name, value, "", "measured", 0.001, 4000, subject=subject)
        for subject in ("npu", "cpu")
        for name, value in (
            ("perplexity_ratio", 1.001),
            ("mean_kl", 0.002),
            ("p99_kl", 0.02),
            ("top1_agreement", 0.97),
            ("prefill_decode_kl", 1e-6),
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
    "min_top1_agreement": (0.96, 0.98, "top1_agreement"),
    "max_prefill_decode_kl": (0.001, 1e-7, "prefill_decode_kl"),
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
    (failed,) = judge(Budget(max_mean_kl=0.01), figures, ("npu",)).failures
    assert str(value) in str(failed)


def test_speed_counts_only_the_accepted_kind() -> None:
    limit = {"at_least": 10, "where": "soc"}
    assert not failures(Budget.model_validate({"min_decode_tokens_per_s": limit | {"accept": "estimated"}}), GOOD)
    (failed,) = failures(Budget.model_validate({"min_decode_tokens_per_s": limit | {"accept": "measured"}}), GOOD)
    assert "not measured (only estimated: 12.5" in str(failed)
    (slow,) = failures(Budget.model_validate({"min_decode_tokens_per_s": {"at_least": 400, "where": "host"}}), GOOD)
    assert "300" in str(slow)
    assert "beyond by 100" in str(slow)


def test_default_budget_is_readable_and_asks_for_everything_that_a_run_measures() -> None:
    budget = Budget.from_file(DEFAULT_BUDGET)
    assert budget.max_artifact_bytes == 4_000_000_000
    assert judge(budget, GOOD, ("npu", "cpu")).passed


def write(folder: Path, text: str) -> Path:
    path = folder / "budget.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_mean_k: 0.1", ["unknown key", "did you mean max_mean_kl?"]),
        ("zzz: 0.1", ["unknown key", "known keys: max_perplexity_ratio"]),
        ("min_decode_tokens_per_s: {at_lest: 3}", ["at_lest", "did you mean at_least?"]),
        ("min_decode_tokens_per_s: {at_least: 3, accept: guessed}", ["accept", "guessed"]),
        ("max_mean_kl: soon", ["max_mean_kl", "soon"]),
        ("max_mean_kl: -1", ["max_mean_kl", "greater than 0"]),
        ("min_top1_agreement: 96", ["min_top1_agreement", "less than or equal to 1"]),
        ("max_memory_bytes: 3 parsecs", ["max_memory_bytes", "parsecs"]),
        ("", ["no limits"]),
        ("- 3", ["no limits"]),
        ("a: [", ["not YAML", "line 1"]),
    ],
)
def test_a_bad_budget_says_what_is_wrong_and_where(tmp_path: Path, text: str, told: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Budget.from_file(write(tmp_path, text))
    assert "budget.yaml" in str(caught.value)
    for words in told:
        assert words in str(caught.value)


def test_a_missing_budget_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Budget.from_file(tmp_path / "none.yaml")


def test_sizes_are_read_with_units(tmp_path: Path) -> None:
    assert Budget.from_file(write(tmp_path, "max_memory_bytes: 1.5 GiB")).max_memory_bytes == 1.5 * 2**30
