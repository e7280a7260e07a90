"""How a run tells what it is doing: bars on a terminal, plain lines elsewhere (CI)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from bluelm.clean import visible
from bluelm.progress import Progress, Task

SECONDS_BETWEEN_LINES = 10.0
log = logging.getLogger("bluelm_export")


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Yield the `Progress` that fits where `console` writes to."""
    if not console.is_terminal:
        yield PlainProgress(console)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console, transient=True) as bars:
        yield BarProgress(bars)


def _finished(console: Console, name: str, started: float) -> None:
    line = f"{name}: done in {time.monotonic() - started:.1f} s"
    console.print(f"[green]done[/] {escape(name)} [dim]{time.monotonic() - started:.1f} s[/]", highlight=False)
    log.info(line)


class BarProgress:
    """One bar for each task that is under way; a finished one leaves a line."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        log.info("%s: begins, %d steps", name, total)
        started = time.monotonic()
        bar = self._bars.add_task(escape(visible(name)), total=total, note="")
        try:
            yield _BarTask(self._bars, bar)
        finally:
            self._bars.remove_task(bar)
        _finished(self._bars.console, name, started)


class _BarTask:
    def __init__(self, bars: RichProgress, bar: object) -> None:
        self._bars, self._bar = bars, bar

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._bars.update(self._bar, advance=steps, note=escape(visible(note)))  # pyright: ignore[reportArgumentType]


class PlainProgress:
    """A line when a task begins, at most one each ten seconds while it runs, and one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        log.info("%s: begins, %d steps", name, total)
        self._console.print(f"{name} ...", highlight=False, markup=False)
        started = time.monotonic()
        yield _PlainTask(self._console, name, total)
        _finished(self._console, name, started)


class _PlainTask:
    def __init__(self, console: Console, name: str, total: int) -> None:
        self._console, self._name, self._total = console, name, total
        self._done = 0
        self._started = self._told = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._told < SECONDS_BETWEEN_LINES or self._done >= self._total:
            return
        self._told = now
        left = (now - self._started) / max(self._done, 1) * (self._total - self._done)
        line = f"{self._name}: {self._done}/{self._total}, about {left:.0f} s left{f', {note}' if note else ''}"
        self._console.print(line, highlight=False, markup=False)
