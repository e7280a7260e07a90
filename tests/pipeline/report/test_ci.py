"""JUnit's XML, the summary in Markdown and GitHub's annotations say what the report says."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest
from rich.console import Console

from bluelm.errors import InputError
from bluelm.system.files import json_text
from eval.budget.budget import judge
from eval.budget.limits import Budget
from eval.report import Report, show
from pipeline.commands.report import write_all
from pipeline.errors import guard
from pipeline.report.ci_outputs import announce, summary, write_junit
from tests.support.reports import example


def test_junit_has_a_case_a_limit_and_tells_what_failed(tmp_path: Path) -> None:
    report = example()
    suites = Xml.parse(write_junit(report, tmp_path)).getroot()
    (suite,) = suites
    failed = [check for check in report.checks if not check.passed]
    assert len(failed) == 1
    tests = str(len(report.checks) + 1)
    for element in (suites, suite):
        assert (element.get("tests"), element.get("failures"), element.get("errors")) == (tests, "1", "0")
    cases = suite.findall("testcase")
    skipped = cases.pop()
    assert skipped.get("name") == "NPU artifact: codes & scales cannot be read back"
    assert skipped.find("skipped") is not None
    assert suite.get("skipped") == "1"
    assert [(c.get("name"), c.get("classname")) for c in cases] == [
        (check.name, f"snapdragon (SM8650).{check.subject}") for check in report.checks
    ]
    messages = [f.get("message") for c in cases for f in c.findall("failure")]
    assert messages == [str(failed[0])]
    assert "beyond by" in str(messages[0])


def test_junit_stands_any_text(tmp_path: Path) -> None:
    report = example(title="a \x00 & <b> \ud800 模型")
    suite = Xml.parse(write_junit(report, tmp_path)).getroot()[0]
    assert suite.get("name") == "a \\x00 & <b> \\ud800 模型"


def test_a_figure_not_measured_is_a_failure(tmp_path: Path) -> None:
    report = example()
    unmeasured = dataclasses.replace(report.checks[0], value=None, margin=None, passed=False, note="not measured")
    report = report.model_copy(update={"checks": (unmeasured,)})
    suite = Xml.parse(write_junit(report, tmp_path)).getroot()[0]
    assert "not measured" in str(suite.findall("testcase/failure")[0].get("message"))


def test_the_summary_is_markdown_with_the_verdict_first() -> None:
    text = summary(example())
    assert text.startswith("## ❌ FAILED: a model & &lt;others>, 4-bit")
    assert "| ❌ | `min_top1_agreement` | cpu |" in text
    assert "| ✅ | `max_mean_kl` | npu | 0.00107 nats/token, at most 0.01 nats/token |" in text
    assert "> Not known, NPU artifact: codes & scales cannot be read back\n" in text
    assert "the model chats \\| the text does not" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    assert summary(example(passed=True)).startswith("## ✅ PASSED")


def test_github_gets_annotations_and_a_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "step.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    announce(example())
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("::error title=min_top1_agreement (cpu)::min_top1_agreement (cpu): 0.873")
    assert told[1] == "::warning title=a model & <others>%2C 4-bit::the model chats | the text%0Adoes not, 100%25"
    assert len(told) == 2
    assert page.read_text() == "before\n" + summary(example())

    def bad() -> int:
        raise InputError("no such thing", where="there", fix="correct it")

    assert guard(bad, resume="") == 2
    assert "::error title=bluelm-export::no such thing%0A" in capsys.readouterr().out


def test_outside_github_nothing_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    announce(example())
    assert capsys.readouterr().out == ""


def test_a_finished_run_is_written_again(tmp_path: Path) -> None:
    report = example()
    report.save(tmp_path)
    names = sorted(path.name for path in write_all(Report.open(tmp_path), tmp_path / "again"))
    assert names == ["junit.xml", "report.html", "summary.md"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_page_stands_figures_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    report = example()
    broken = tuple(dataclasses.replace(m, value=value, error=value, low=value, high=value) for m in report.measurements)
    checks = judge(Budget.model_validate(report.budget), broken, ["npu", "cpu"]).checks
    assert not any(check.passed for check in checks if check.value is None)
    report = report.model_copy(update={"measurements": broken, "checks": checks})
    report.save(tmp_path)
    write_all(report, tmp_path)
    again = Report.open(tmp_path)
    assert repr(again.measurements) == repr(broken)
    for page in ("report.html", "summary.md", "junit.xml"):
        assert f"the figure is {value}" in (tmp_path / page).read_text()
    show(report, Console(file=io.StringIO()))


def test_json_without_numbers_that_it_has_not() -> None:
    value = {"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf, "d": None, "e": "NaN"}}
    assert json.loads(json_text(value), parse_constant=pytest.fail) == {
        "a": ["NaN", [1.5, "Infinity"]],
        "b": {"c": "-Infinity", "d": None, "e": "NaN"},
    }
