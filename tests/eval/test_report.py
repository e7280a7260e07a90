"""The report: what is written can be read, and the terminal shows the verdict first."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bluelm.errors import InputError
from eval.budget.budget import Check, judge
from eval.budget.limits import Budget
from eval.measurement import Measurement
from eval.report import Built, Report, ReportStage, format_value, show, told, tool_versions

FIGURES = (
    Measurement("tokens_judged", 512, "tokens", "measured", subject="npu"),
    Measurement("mean_kl", 0.0014412, "nats/token", "measured", 0.0000217, 512, subject="npu"),
    Measurement("top1_agreement", math.nan, "", "measured", subject="npu"),
    Measurement("decode_tokens_per_s", 12.3, "tokens/s", "estimated", 2, None, "noisy", "soc", 9.1, 15.2),
    Measurement("artifact_bytes", 7.1e6, "bytes", "measured", subject="files"),
)


@pytest.fixture
def report() -> Report:
    budget = Budget(max_mean_kl=0.001, min_top1_agreement=0.9)
    verdict = judge(budget, FIGURES, ["npu"])
    return Report(
        passed=verdict.passed,
        title="a model, on a chip",
        target="snapdragon (SM8650)",
        artifacts={"npu": Built(folder="compiled", on="htp")},
        configuration={"context": 512},
        inputs={"checkpoint": "ab"},
        versions=tool_versions(),
        stages=(ReportStage(name="quantized", seconds=1.5, reused=False),),
        measurements=FIGURES,
        budget=budget.model_dump(mode="json", exclude_none=True),
        checks=verdict.checks,
        warnings=("no chat",),
    )


def test_what_is_written_is_read_again(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    again = Report.open(tmp_path)
    assert again.checks == report.checks
    assert again.measurements[1] == report.measurements[1]
    assert math.isnan(again.measurements[2].value)
    assert again.versions["torch"].startswith("2.")


def test_damaged_reports_are_bad_input(report: Report, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no report"):
        Report.open(tmp_path)
    path = report.save(tmp_path)
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(InputError, match="cannot be read"):
        Report.open(tmp_path)


def test_the_terminal_shows_the_verdict_first(report: Report) -> None:
    out = io.StringIO()
    show(report, Console(file=out, width=100))
    text = out.getvalue()
    order = [
        "FAILED  a model, on a chip",
        "FAIL max_mean_kl (npu)",
        "the figure is nan",
        "no chat",
        "Accuracy",
        "Speed",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert "0.001441 ± 0.000022" in text
    assert "estimated, noisy" in text
    assert "9.1 to 15.2" in text


@pytest.mark.parametrize(
    ("value", "error", "unit", "shown"),
    [
        (36.7112, 7.3, "", "36.7 ± 7.3"),
        (0.971, 0.0026, "", "0.9710 ± 0.0026"),
        (513306.2, 74012.0, "", "513,306 ± 74,012"),
        (7_100_000, None, "bytes", "7.1 MB"),
        (2048, None, "tokens", "2,048"),
        (0.0000123, None, "", "1.23e-05"),
        (math.nan, None, "", "nan"),
        (math.nan, 1e-12, "", "nan"),
        (0.5, math.nan, "", "0.5"),
        (-math.inf, 2, "", "-inf"),
        (math.inf, math.inf, "nats/token", "inf"),
        (math.nan, None, "bytes", "nan MB"),
    ],
)
def test_figures_read_well(value: float, error: float | None, unit: str, shown: str) -> None:
    assert format_value(Measurement("x", value, unit, "measured", error)) == shown


def test_what_is_not_known_is_never_told_as_read_back() -> None:
    """Accepted by the budget it passes, and is told as what it is."""
    known = Check("max_not_known", "cpu", 0, "items", 0, 0, True, "measured", outcome="passed")
    accepted = replace(known, subject="npu", value=82)
    _, lines = told([known, accepted])
    assert lines == [
        "as it should be (cpu): all of it read back",
        "as it should be (npu): 82 items not known, which the budget accepts",
    ]
