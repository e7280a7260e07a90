"""Pages of benchmarks come from the results that their commands wrote, and documents cite no other figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks import pages

ROOT = Path(__file__).parent.parent
CITED = yaml.safe_load((pages.RESULTS / "cited.yaml").read_text(encoding="utf-8"))
NUMBER = re.compile(r"(?<![\w.-])\d[\d,.]*\d|(?<![\w.-])\d(?!\w)")
UNITS = r"(?:%|s\b|ms\b|us\b|seconds|minutes|GB|MB\b|MiB|tokens/s|times\b|nats)"
FIGURE = re.compile(rf"(?<![\w.-])(?:\d[\d,.]*(?:e-?\d+)?\s?{UNITS}|\d+\.\d+(?:e-?\d+)?(?![\w.])|\d+e-\d+)")


def cited() -> list[tuple[str, str]]:
    """Files, and what they say of results, word for word."""
    return [(row["in"], row["says"].format(**pages.source(row["from"]))) for row in CITED["cited"]]


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", pages.names())
def test_a_page_is_what_its_results_make(name: str) -> None:
    assert (pages.HERE / f"{name}.md").read_text(encoding="utf-8") == pages.render(name)


def test_every_page_is_made_of_results_that_say_when_and_of_which_commit() -> None:
    written = {path.stem for path in pages.HERE.glob("*.md")}
    assert written == set(pages.names())
    for name in set(pages.names()) - {"speed_model"}:  # that one is the same whenever it is fitted
        parts = pages.results(name)
        stamps = [parts["made"]] if "made" in parts else [part["made"] for part in parts.values()]
        for made in stamps:
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["day"]), name
            assert re.fullmatch(r"[0-9a-f]{7,}", made["commit"]), name
            assert made["command"], name


@pytest.mark.parametrize("name", sorted(set(pages.names()) - set(CITED["prose_left"])))
def test_no_figure_stands_in_a_page_s_own_words(name: str) -> None:
    """Numbers with a unit come from the results; limits and options are listed as settings."""
    text = (pages.PAGES / f"{name}.md.jinja").read_text(encoding="utf-8")
    words = re.sub(r"{[{%].*?[}%]}|`[^`]*`", " ", text, flags=re.DOTALL)
    found = {plain(figure) for figure in FIGURE.findall(words)}
    assert found <= set(CITED["settings"].get(name, [])), found


def test_documents_say_what_results_say() -> None:
    for file, says in cited():
        assert plain(says) in plain((ROOT / file).read_text(encoding="utf-8")), f"{file} should say: {says}"


def test_the_readme_shows_the_main_run_s_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    assert [row for row in shown if row[0] != "..."] == pages.results("main_run")["rows"]


def test_a_paragraph_that_names_a_page_has_no_figures_of_its_own() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        name = path.relative_to(ROOT).as_posix()
        known = " ".join([*(says for file, says in cited() if file == name), *CITED["settings"].get(name, [])])
        for paragraph in re.split(r"\n\s*\n|\n(?=- )", path.read_text(encoding="utf-8")):
            if re.search(r"benchmarks/\w+\.md", paragraph):
                left = set(NUMBER.findall(re.sub(r"`[^`]*`", "", paragraph))) - set(NUMBER.findall(known))
                assert not left, f"{name}: {left} in: {plain(paragraph)[:100]}"


def test_results_are_strict_json() -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    for path in pages.RESULTS.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
