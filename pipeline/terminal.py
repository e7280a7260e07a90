"""Output of the command line: everything that goes to a terminal or a CI log is cleaned here."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from typing import cast

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from bluelm.text.clean import Pieces, clean, visible

_LINES = re.compile(r"[^\n]*\n|[^\n]+")


def say(text: object = "", *, error: bool = False) -> None:
    """A line (or more) on standard output, or on standard error."""
    print(clean(str(text)), file=sys.stderr if error else sys.stdout, flush=True)


class Answer:
    """What a model says, on standard output as it comes; the text is the model's, and cleaned as a file's is."""

    def __init__(self) -> None:
        self._pieces = Pieces()

    def add(self, text: str) -> None:
        """Any part of it."""
        print(self._pieces.push(text), end="", flush=True)

    def end(self) -> None:
        """No more comes."""
        print(self._pieces.flush(), flush=True)


def console(*, error: bool = False) -> Console:
    """A console of rich on standard output or standard error, whose own colours are all that steers."""
    made = Console(stderr=error)
    made.push_render_hook(_Hook())
    return made


class _Warnings(logging.Handler):
    """Shows warnings of the log; errors are reported where they occur."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            say(f"warning: {record.getMessage()}", error=True)


def show_warnings() -> None:
    """Let what the log warns of appear on standard error, above a progress bar where there is one."""
    log = logging.getLogger("bluelm_export")
    if not any(isinstance(handler, _Warnings) for handler in log.handlers):
        log.addHandler(_Warnings(logging.WARNING))


class LogLine(logging.Formatter):
    """A record of the log file, which is shown on terminals too."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


class _Hook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [cast(ConsoleRenderable, _Cleaned(one)) for one in renderables]


class _Cleaned:
    """What another renderable gives, cleaned line by line."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line: list[Segment] = []
        for segment in console.render(self._inner, options):
            if segment.control:
                line.append(segment)
            for part in () if segment.control else _LINES.findall(segment.text):
                line.append(Segment(part, segment.style))
                if part.endswith("\n"):
                    yield from _cleaned(line)
                    line = []
        yield from _cleaned(line)


def _cleaned(line: list[Segment]) -> Iterator[Segment]:
    """The segments of one line."""
    whole = "".join(segment.text for segment in line if not segment.control)
    if whole.lstrip().startswith("::"):
        yield Segment("\\")
    for segment in line:
        yield segment if segment.control else Segment(visible(segment.text), segment.style)
