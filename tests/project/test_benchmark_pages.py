"""Pages of benchmarks come from the results that their commands wrote, and documents cite no other figures."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import pages
from benchmarks.accuracy import coverage

ROOT = Path(__file__).parents[2]
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
    assert pages.page_file(name).read_text(encoding="utf-8") == pages.render(name)


def stamps(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parts of a benchmark's results, and when each, or some of its rows, was measured; "" for results in one part."""
    found = pages.results(name)
    for part, value in [("", found)] if "made" in found else found.items():
        yield from ((part, made) for made in [value["made"], *value.get("earlier", [])])


def command_of(path: Path) -> str:
    """The module that `python -m` runs: a package with a command of its own goes by its name."""
    if path.stem in ("command", "campaign"):
        path = path.parent
    return ".".join(path.relative_to(pages.HERE.parent).with_suffix("").parts)


def source_of(command: str) -> str:
    """The code of a command, or of all of its package."""
    place = pages.HERE.parent.joinpath(*command.split("."))
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return " ".join(file.read_text(encoding="utf-8") for file in files)


def writers() -> dict[tuple[str, str], set[str]]:
    """The commands that save a part of results, by their code; where code does not name the part, any."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in pages.HERE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("pages.save", "pages.save_rows"):
                name, part = (node.value if isinstance(node, ast.Constant) else "" for node in call.args[:2])
                found.setdefault((str(name), str(part)), set()).add(command_of(path))
    return found


def test_every_page_is_made_of_results_that_say_when_and_of_which_commit() -> None:
    written = {path.stem for path in pages.HERE.rglob("*.md")}
    assert written == set(pages.names())
    for name in set(pages.names()) - {"speed_model"}:  # that one is the same whenever it is fitted
        text = plain(pages.page_file(name).read_text(encoding="utf-8"))
        for part, made in stamps(name):
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["day"]), name
            assert re.fullmatch(r"[0-9a-f]{7,}", made["commit"]), name
            assert made["day"] in text and made["commit"] in text, f"{name}: {part} does not say when it was measured"
            assert made.get("note", "") in text


@pytest.mark.parametrize("name", sorted(path.stem for path in pages.RESULTS.rglob("*.json")))
def test_results_are_of_a_command_that_writes_them(name: str) -> None:
    by_part = writers()
    own = set[str]().union(*(modules for (of, _), modules in by_part.items() if of == name))
    assert own, f"no command writes {name}.json"
    for part, made in stamps(name) if name != "speed_model" else ():
        assert made.keys() - {"note"} == pages.stamp().keys(), f"{part}: not what a command writes of itself"
        called = re.findall(r"benchmarks(?:\.\w+)+", made["command"])
        writing = by_part.get((name, part), set()) | by_part.get((name, ""), set())
        said = " ".join(map(source_of, called))
        assert "note" not in made or any('"--note"' in source_of(one) for one in writing), part
        assert made["command"].startswith("make ") or any(one in called or one in said for one in writing), part


@pytest.mark.parametrize("name", pages.names())
def test_no_figure_stands_in_a_page_s_own_words(name: str) -> None:
    """Numbers with a unit come from the results; limits and options are listed as settings."""
    text = pages.template(name).read_text(encoding="utf-8")
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


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def known(path: Path) -> tuple[str, list[str]]:
    """A document's name, and what it may say: results, word for word, and settings."""
    name = path.relative_to(ROOT).as_posix()
    return name, [*(says for file, says in cited() if file == name), *CITED["settings"].get(name, [])]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_document_s_figures_are_cited(path: Path) -> None:
    """Outside code and the table of the main run."""
    name, says = known(path)
    text = re.sub(
        r"```.*?```|`[^`]*`|^[│┃┏┡└].*?$", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    left = {plain(figure) for figure in FIGURE.findall(text)} - {plain(f) for f in FIGURE.findall(" | ".join(says))}
    assert not left, f"{name}: {left}"


def test_a_paragraph_that_names_a_page_has_no_figures_of_its_own() -> None:
    for path in DOCUMENTS:
        name, says = known(path)
        for paragraph in re.split(r"\n\s*\n|\n(?=- )", path.read_text(encoding="utf-8")):
            if re.search(r"benchmarks/[\w/]+\.md", paragraph):
                left = set(NUMBER.findall(re.sub(r"`[^`]*`", "", paragraph))) - set(NUMBER.findall(" ".join(says)))
                assert not left, f"{name}: {left} in: {plain(paragraph)[:100]}"


def test_the_gate_and_the_mutants_reach_what_was_asked() -> None:
    """Every damage is caught, every honest run passes, nearly every small fault is seen: overall and in each module."""
    gate, modules = pages.results("gate"), pages.results("mutants")["modules"]
    damage, honest = gate["damage"], gate["honest"]
    assert damage["judged"] == damage["caught"] >= 150 and not damage["missed"]
    assert damage["sound"] == damage["sound_passed"] == damage["runtimes"]
    assert honest["judged"] == honest["passed"] >= 40 and honest["architectures"] >= 3
    assert len(honest["table"]["rows"]) == honest["judged"]
    assert sum(row["killed"] for row in modules) >= 0.95 * sum(row["tried"] for row in modules) > 0
    assert not [row["module"] for row in modules if row["killed"] < 0.95 * row["tried"]]


def test_results_are_strict_json() -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    for path in pages.RESULTS.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results and pages are written there, each part with a stamp of its own."""
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "HERE", tmp_path)
    commits = iter(range(1, 100))
    about = {"day": "2026-01-01", "machine": "a", "command": "python -m benchmarks.x"}
    monkeypatch.setattr(pages, "stamp", lambda: {**about, "commit": f"{next(commits)}"})
    return tmp_path


def saved(*rows: list[str], **about: Any) -> dict[str, Any]:
    pages.save_rows("any", "demo", ("what", "of", "value"), rows, key=2, **about)
    return pages.results("any")["demo"]


def test_rows_take_the_place_of_those_of_their_name_and_others_keep_their_day(home: Path) -> None:
    saved(["a", "1", "old"], ["b", "1", "old"], ["b", "2", "old"])
    assert "ages" not in saved(["a", "1", "old"], ["b", "1", "old"], ["b", "2", "old"])["table"]
    part = saved(["b", "1", "new"], ["c", "1", "new"])
    assert part["table"]["rows"] == [["a", "1", "old"], ["b", "1", "new"], ["b", "2", "old"], ["c", "1", "new"]]
    assert pages.table(part).splitlines()[2:] == [
        "| a | 1 | old | 2026-01-01, 2 |",
        "| b | 1 | new | 2026-01-01, 3 |",
        "| b | 2 | old | 2026-01-01, 2 |",
        "| c | 1 | new | 2026-01-01, 3 |",
    ]
    part = saved(["b", "2", "newer"])
    assert [line.rpartition(", ")[2] for line in pages.table(part).splitlines()[2:]] == ["2 |", "3 |", "4 |", "3 |"]
    assert pages.made(part).startswith("Measured 2026-01-01 (a), commit 4, but for older rows: those of commit 2 ")


def test_rows_that_the_command_cannot_make_any_more_go(home: Path) -> None:
    saved(["a", "1", "old"], ["gone", "1", "old"], ["b", "1", "old"])
    part = saved(["b", "1", "new"], names=["b, 1", "c, 1", "a, 1"])
    assert part["table"]["rows"] == [["b", "1", "new"], ["a", "1", "old"]]


def test_a_table_of_other_columns_or_of_another_text_begins_anew(home: Path) -> None:
    saved(["a", "1", "old"], ["b", "1", "old"], windows=8)
    assert saved(["a", "1", "new"], windows=32)["table"]["rows"] == [["a", "1", "new"]]
    pages.save_rows("any", "demo", ("what", "seconds"), [["b", "1"]], windows=32)
    part = pages.results("any")["demo"]
    assert part["table"]["rows"] == [["b", "1"]] and "earlier" not in part


def test_parts_beside_the_one_that_is_saved_stay(home: Path) -> None:
    saved(["a", "1", "x"])
    pages.save_rows("any", "other", ("what",), [["y"]])
    assert {part: found["made"]["commit"] for part, found in pages.results("any").items()} == {
        "demo": "1",
        "other": "2",
    }


def test_a_command_makes_its_page_again(home: Path) -> None:
    """All of it but the stamp: these draws are the same on every machine."""
    before = json.loads((ROOT / "benchmarks" / "results" / "accuracy" / "coverage.json").read_text(encoding="utf-8"))
    coverage.main()
    assert {**pages.results("coverage")["simulation"], "made": 0} == {**before["simulation"], "made": 0}
    assert pages.page_file("coverage").read_text(encoding="utf-8") == pages.render("coverage")


def test_no_setting_is_listed_that_nobody_speaks_of() -> None:
    for name, settings in CITED["settings"].items():
        path = ROOT / name if name.endswith(".md") else pages.template(name)
        spoken = set(NUMBER.findall(path.read_text(encoding="utf-8")))
        assert set(NUMBER.findall(" | ".join(settings))) <= spoken, name
