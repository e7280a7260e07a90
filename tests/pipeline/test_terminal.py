"""What is printed from files steers neither a terminal nor a CI system."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bluelm.text.clean import Pieces, clean, visible
from pipeline import terminal
from pipeline.cli import main
from pipeline.progress import show_progress
from pipeline.report.ci_outputs import summary, write_junit
from pipeline.report.github import annotation
from pipeline.report.page import write_page
from tests.support.reports import example

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202e\u2028b\n::error::gone\n  ::set-output name=x::1"
HOSTILE += "\n##[error]x ##vso[x]"
PARTS = ["::", "\n", "\r", " ", "\u3000", "##[", "##vso[", "\x1b[2J", "#", "a"]
STEERING = [chr(code) for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\t\n"]
STEERING += ["\u202e", "\u2066", "\u2028", "\u200f", "\ufeff", "\U000e0041"]


def harmless(text: str) -> bool:
    lines = text.split("\n")
    return (
        not any(character in text for character in STEERING)
        and not any(line.strip().startswith("::") for line in lines)
        and not any("##[" in line or "##vso[" in line for line in lines)
    )


@given(st.text() | st.lists(st.sampled_from(PARTS)).map("".join))
def test_whatever_is_cleaned_is_harmless(text: str) -> None:
    assert harmless(clean(text))
    assert clean(clean(text)) == clean(text)
    assert not any(character in visible(text) for character in STEERING)


@given(st.lists(st.sampled_from([*PARTS, ":", "v", "s", "o", "[", "##v", "\t", "\x1c", "\ud800", " x", ""])))
def test_text_in_pieces_is_cleaned_as_the_whole(pieces: list[str]) -> None:
    """However it was cut: a command in two tokens, behind a line's end inside one, a letter at a time."""
    for cut in (pieces, list("".join(pieces)), ["".join(pieces)]):
        stream = Pieces()
        assert "".join([*map(stream.push, cut), stream.flush()]) == clean("".join(pieces))


def test_text_in_pieces_is_not_kept_waiting() -> None:
    """But for what may become a command, each piece is shown when it comes."""
    stream = Pieces()
    steps = [("The", "The"), (" C#", " C"), (" a::b", "# a::b"), ("\n", "\n"), (" ", ""), ("x", " x"), (":", ":")]
    steps += [
        ("\n :", "\n"),
        (":error::x", "\\ ::error::x"),
        ("\n:", "\n"),
        (")", ":)"),
        (" ##", " "),
        ("[e]", "#\\#[e]"),
    ]
    assert [stream.push(piece) for piece, _ in steps] == [shown for _, shown in steps]
    assert stream.flush() == ""


def test_what_is_usual_stays() -> None:
    for text in ("", "model.layers.0.mlp", "你好 🦄 é\n\ttab", "a::b ## c # [d]", "std::v", "👩\u200d👩\u200d👧 نص"):
        assert clean(text) == text
    assert clean("\x1b[1m\u202e\U000e0041") == "\\x1b[1m\\u202e\\U000e0041"
    assert clean("::error::x\n ::y") == "\\::error::x\n\\ ::y"


def test_the_ways_out_are_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain lines, errors, rich's text, tables and markup, progress: on a pipe nothing of rich's own steers either."""
    terminal.say(HOSTILE)
    terminal.say(HOSTILE, error=True)
    console = terminal.console()
    console.print(HOSTILE, highlight=False, markup=False)
    console.print(HOSTILE, soft_wrap=True)
    console.print(Text(":", style="red"), Text(":error::x"), sep="")
    table = Table(HOSTILE, title=HOSTILE, show_edge=False, show_header=False, box=None)
    table.add_row(HOSTILE)
    console.print(table)
    with show_progress(terminal.console(error=True)) as progress, progress.task(HOSTILE, total=1) as task:
        task.advance(note=HOSTILE)
    found = capsys.readouterr()
    assert "red" in found.out and "red" in found.err
    assert harmless(found.out), found.out
    assert harmless(found.err), found.err
    answer = terminal.Answer()
    for piece in ("\x1b[2Jstd", "::vector\n", ":", ":error::x\n :"):
        answer.add(piece)
    answer.end()
    assert capsys.readouterr().out == "\\x1b[2Jstd::vector\n\\::error::x\n :\n"


def test_on_a_terminal_only_our_own_colours_steer() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard", width=200)
    console.push_render_hook(terminal._Hook())
    console.print(f"[bold]x[/] \x1b[31m{'y'}", highlight=False)
    assert shown.getvalue() == "\x1b[1mx\x1b[0m \\x1b[31my\n"


def test_reports_are_cleaned(tmp_path: Path) -> None:
    """junit.xml, the summary, the page, and GitHub's annotations, which are one line each."""
    hostile = example().model_copy(update={"title": HOSTILE, "warnings": (HOSTILE,)})
    junit = Xml.parse(write_junit(hostile, tmp_path)).getroot()
    texts = [*junit.itertext(), *(value for element in junit.iter() for value in element.attrib.values())]
    assert any("red" in text for text in texts)
    page = write_page(hostile, tmp_path).read_text(encoding="utf-8")
    for text in (*texts, summary(hostile), page):
        assert not any(character in text for character in STEERING)
    command = annotation("error", HOSTILE, HOSTILE)
    assert command.startswith("::error title=a\\x1b") and "\n" not in command
    assert not any(character in command for character in STEERING)


def test_a_hostile_name_in_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m\x1b[2J\n::error::x"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["\\u001b]0;x\\u0007"]}')
    with pytest.raises(SystemExit) as left:
        main(["quantize", str(folder), str(tmp_path / "out")])
    found = capsys.readouterr()
    assert left.value.code == 2
    assert "\\x1b[2J" in found.err
    assert harmless(found.out + found.err)


def test_nothing_is_printed_past_the_cleaning() -> None:
    """`print` and rich's `Console` are called in one place; GitHub's commands and a child's answers are apart."""
    allowed = {
        "pipeline/terminal.py": 4,
        "pipeline/report/ci_outputs.py": 1,
        "pipeline/errors.py": 1,
        "bluelm/text/sandbox.py": 1,
    }
    found: dict[str, int] = {}
    for package in ("bluelm", "calibration", "compress", "export", "targets", "eval", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if "/data/" in name:  # programs that are run elsewhere
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = node.func if isinstance(node, ast.Call) else None
                if isinstance(called, ast.Name) and called.id in ("print", "Console"):
                    found[name] = found.get(name, 0) + 1
    assert found == allowed
