"""The page of a report: one file, verdict first, laid out by a real browser at a desk's and a phone's width."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eval.report import Report
from pipeline.report.page import files, render, size, write_page
from tests.support.browser import lay_out, picture
from tests.support.reports import example


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(example(), tmp_path_factory.mktemp("page"))


def test_the_page_needs_nothing_else_and_runs_nothing(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<(script|link|iframe|img|object)\b", text)
    assert not re.search(r"""(src|href)=["'](?!#)""", text)
    assert not re.findall(r"url\((?!#)[^)]*\)|@import", text)
    assert "default-src 'none'" in text
    assert render(example()) == text, "the same report gives the same page"
    assert len(text) < 300_000


def test_text_of_the_user_is_text(page: Path) -> None:
    assert "a model &amp; &lt;others&gt;" in page.read_text()
    assert "<others>" not in page.read_text()


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_lays_it_out(page: Path, width: int) -> None:
    found = lay_out(page, width)
    assert found.width <= width, "nothing makes the page scroll sideways"
    titles = [title for title, _ in found.headings]
    assert titles[0] == "FAILED"
    assert found.headings[0][1] < 60
    assert titles[1:] == [
        "Warnings",
        "Accuracy on held-out text",
        "By domain",
        "Error by block",
        "Size by part",
        "Size by file",
        "Speed on the phone, among published ones",
        "Speed, size and memory",
        "What was done",
    ]
    assert len(found.plots) == 6
    for left, right, height in found.plots:
        assert left >= 0
        assert right <= width
        assert right - left > 280
        assert height > 100
    assert found.smallest > 9.5, "CSS pixels of the smallest text in a plot"
    assert found.outside == []


def test_the_verdict_is_red_or_green(page: Path, tmp_path: Path) -> None:
    passed = write_page(example(passed=True), tmp_path)
    for path, word, strong in ((page, "FAILED", 0), (passed, "PASSED", 1)):
        image = picture(path, 500, 700)
        border = image.getpixel((22, 60))
        assert isinstance(border, tuple)
        assert max(border) == border[strong], "the verdict's border"
        assert len(image.getcolors(1 << 20) or []) > 50
        assert f'<div class="verdict">{word}</div>' in path.read_text()


def test_failed_limits_come_first(page: Path) -> None:
    marks = re.findall(r'<span class="mark(?: bad)?">(\w+)</span>', page.read_text())
    assert marks == sorted(marks, key=lambda mark: mark != "FAIL")
    assert "FAIL" in marks


def test_sizes_are_those_of_the_first_artifact() -> None:
    plot = size(example()).plot
    assert "2 MB, 34%" in plot, "of 5.9 MB"
    assert "0.7 MB, 12%" in plot
    assert "simulator" not in files(example()).plot
    assert "1.5 MB, 27%" in files(example()).plot


def test_a_report_without_figures_has_a_page(tmp_path: Path) -> None:
    empty: Report = example(passed=True).model_copy(update={"measurements": (), "details": {}, "checks": ()})
    found = lay_out(write_page(empty, tmp_path), 390)
    assert [title for title, _ in found.headings] == ["PASSED", "Warnings", "What was done"]
    assert found.plots == []
