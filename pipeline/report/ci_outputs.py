"""A report's outputs for CI systems: junit.xml, a summary in Markdown, GitHub's annotations."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree as Xml

from bluelm.system.files import atomic_file, write_text
from bluelm.text.clean import visible
from eval.budget.budget import Check
from eval.report import PLACES, SUBJECTS, Report, emulated, format_value, label, side_by_side, task_rows
from pipeline.report.github import annotation, in_github

JUNIT, SUMMARY = "junit.xml", "summary.md"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def write_junit(report: Report, folder: Path) -> Path:
    """Write `folder`/junit.xml: every limit of the budget is a test case, a figure not measured fails it.

    The dialect is the one that GitLab, Jenkins and GitHub's readers agree on: testsuites, testsuite, testcase,
    failure, skipped, properties. What an artifact's format does not tell is a skipped test case.
    """
    failed = sum(not check.passed for check in report.checks)
    seconds = f"{sum(stage.seconds for stage in report.stages):.2f}"
    skipped = report.not_known
    counts = {"tests": str(len(report.checks) + len(skipped)), "failures": str(failed), "errors": "0", "time": seconds}
    root = Xml.Element("testsuites", {"name": "bluelm-export", **counts})
    suite = Xml.SubElement(root, "testsuite", {"name": _clean(report.title), "skipped": str(len(skipped)), **counts})
    properties = Xml.SubElement(suite, "properties")
    stand_ins = {f"emulated {i}": text for i, text in enumerate(emulated(report.measurements), 1)}
    for name, value in {"target": report.target, **report.versions, **report.inputs, **stand_ins}.items():
        Xml.SubElement(properties, "property", name=_clean(name), value=_clean(value))
    for check in report.checks:
        case = Xml.SubElement(
            suite, "testcase", classname=_clean(f"{report.target}.{check.subject}"), name=_clean(check.name), time="0"
        )
        if not check.passed:
            failure = Xml.SubElement(case, "failure", message=_clean(str(check)), type="budget")
            failure.text = _clean(str(check))
        Xml.SubElement(case, "system-out").text = _clean(str(check))
    for text in skipped:
        case = Xml.SubElement(suite, "testcase", classname=_clean(report.target), name=_clean(text), time="0")
        Xml.SubElement(case, "skipped", message="not known")
    Xml.indent(root)
    path = folder / JUNIT
    with atomic_file(path) as temporary:
        Xml.ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)
    return path


def write_summary(report: Report, folder: Path) -> Path:
    """Write `folder`/summary.md."""
    path = folder / SUMMARY
    write_text(path, summary(report))
    return path


def summary(report: Report) -> str:
    """The report in Markdown: the verdict, the limits, what was measured of the artifacts; the rest folded away."""
    lines = [f"## {'✅ PASSED' if report.passed else '❌ FAILED'}: {_cell(report.title)}", ""]
    lines += _table(("", "limit", "of", "figure"), [_check_row(check) for check in report.checks])
    lines += [f"> Not known, {_cell(text)}\n" for text in report.not_known]
    lines += [f"> ⚠️ {_cell(warning)}\n" for warning in report.warnings]
    artifacts, rows = side_by_side(report.measurements)
    lines += _table(("figure, ± one standard error", *artifacts), rows)
    tasks = [row[:4] for row in task_rows(report.measurements)]
    lines += _table(("task", "float model", "artifact", "recovery"), tasks)
    lines += [f"{_cell(text)}\n" for text in emulated(report.measurements)]
    others = [m for m in report.measurements if m.subject not in SUBJECTS]
    rows = [(label(m) + PLACES.get(m.subject, ""), format_value(m), m.how) for m in others]
    lines += ["<details><summary>Speed, size and memory</summary>", ""]
    lines += [*_table(("figure", "value", "how"), rows), "</details>", ""]
    return "\n".join(lines)


def _check_row(check: Check) -> tuple[str, ...]:
    mark = "✅" if check.passed else "❔" if check.outcome == "undecided" else "❌"
    return (mark, f"`{check.name}`", check.subject, str(check).partition(": ")[2])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [_row(headings), _row(["---"] * len(headings)), *(_row(row) for row in rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text that neither ends the cell nor begins HTML."""
    return " ".join(visible(text).split()).replace("|", "\\|").replace("<", "&lt;")


def announce(report: Report) -> None:
    """Inside GitHub Actions: the summary onto the job's page, an annotation for each failure and warning."""
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    if page:
        with Path(page).open("a", encoding="utf-8") as file:
            file.write(summary(report))
    if in_github():
        for line in commands(report):
            print(line, flush=True)


def commands(report: Report) -> Iterator[str]:
    """GitHub's workflow commands, one a failed limit and one a warning."""
    for check in report.checks:
        if not check.passed:
            yield annotation("error", f"{check.name} ({check.subject})", str(check))
    for warning in report.warnings:
        yield annotation("warning", report.title, warning)


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", visible(text))
