"""Documents and docstrings: links and the files that they name are there; the drawing knows the packages."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.support.layers import LAYERS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
SOURCES = [path for folder in (*LAYERS, "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
PLACE = rf"(?:{'|'.join((*LAYERS, 'tests', 'benchmarks', 'docs'))})/[\w./*-]+"
FILE = re.compile(rf"`({PLACE})`")
NAMED = re.compile(rf"\b({PLACE}\.(?:py|md|yaml|csv|json))\b")
RUN = re.compile(r"python -m ((?:benchmarks|tests|pipeline|eval)[\w.]*\w)")
SVG = "{http://www.w3.org/2000/svg}"


def anchor(heading: str) -> str:
    """As GitHub makes one of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        place, _, heading = link.partition("#")
        if "://" in place:
            continue
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), f"{path.relative_to(ROOT)} links to {link}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in map(anchor, headings), f"{path.relative_to(ROOT)} links to {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_files_that_are_named_are_there(path: Path) -> None:
    """`NAME` in capitals stands for a name of the reader's."""
    for name in FILE.findall(path.read_text(encoding="utf-8")):
        if not re.search(r"\b[A-Z]{2,}\b", name.removesuffix(".md")):
            assert any(ROOT.glob(name.rstrip("/"))), f"{path.relative_to(ROOT)} names {name}"


def test_files_that_docstrings_and_comments_name_are_there() -> None:
    for path in SOURCES:
        for name in NAMED.findall(path.read_text(encoding="utf-8")):
            assert any(ROOT.glob(name)), f"{path.relative_to(ROOT)} names {name}"


def test_modules_that_are_to_be_run_are_there() -> None:
    for path in [*DOCUMENTS, *SOURCES]:
        for name in set(RUN.findall(path.read_text(encoding="utf-8"))) - {"benchmarks.NAME", "benchmarks.x"}:
            place = ROOT.joinpath(*name.split("."))
            there = place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
            assert there, f"{path.relative_to(ROOT)} names {name}"


def test_the_drawing_has_the_packages_each_above_those_that_it_imports() -> None:
    drawing = ET.parse(ROOT / "docs" / "architecture.svg")
    rows = {str(text.text): float(text.attrib["y"]) for text in drawing.iter(f"{SVG}text")
            if text.get("class") == "layer-name"}  # fmt: skip
    assert sorted(rows, key=lambda name: -rows[name]) == list(LAYERS)


def test_the_architecture_fits_two_printed_pages() -> None:
    """A page holds about 600 words of prose at ten points; the drawing takes a third of one."""
    assert len((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split()) < 1050
