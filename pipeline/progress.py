"""Progress of a run: bars on a terminal, plain lines elsewhere (CI)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from bluelm.system.progress import Progress, Task
from bluelm.text.clean import visible

SECONDS_BETWEEN_LINES = 10.0
log = logging.getLogger("bluelm_export")


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Yield the `Progress` that fits where `console` writes to."""
    if not console.is_terminal:
        plain = PlainProgress(console)
        with _reminding(plain):
            yield plain
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


@contextmanager
def working(console: Console, name: str) -> Iterator[None]:
    """One piece of work that cannot be counted: a spinner, or plain lines where it takes long."""
    if console.is_terminal:
        with console.status(name):
            yield
        return
    with show_progress(console) as progress, progress.task(name, 1):
        yield


def _finished(console: Console, name: str, seconds: float) -> None:
    console.print(f"[green]done[/] {escape(name)} [dim]{seconds:.1f} s[/]", highlight=False)
    log.info("%s: done in %.1f s", name, seconds)


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
        _finished(self._bars.console, name, time.monotonic() - started)


class _BarTask:
    def __init__(self, bars: RichProgress, bar: object) -> None:
        self._bars, self._bar = bars, bar

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._bars.update(self._bar, advance=steps, note=escape(visible(note)))  # pyright: ignore[reportArgumentType]


class PlainProgress:
    """Lines: when a task begins, when it ends, and one each ten seconds between, whatever it does meanwhile."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self.clock = console, clock
        self._tasks: list[_PlainTask] = []
        self._before = ""
        self._lock = Lock()
        self._said = clock()

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        log.info("%s: begins, %d steps", name, total)
        self.say(f"{name} ...")
        started, one = self.clock(), _PlainTask(self, name, total)
        self._tasks.append(one)
        try:
            yield one
        finally:
            self._tasks.remove(one)
            self._before, self._said = name, self.clock()
        _finished(self._console, name, self.clock() - started)

    def say(self, line: str) -> None:
        """Print it now."""
        with self._lock:
            self._said = self.clock()
            self._console.print(line, highlight=False, markup=False)

    @property
    def is_quiet(self) -> bool:
        """Whether it is time for a line again."""
        return self.clock() - self._said >= SECONDS_BETWEEN_LINES

    def remind(self) -> None:
        """Say what is under way, if nothing was said for ten seconds."""
        if not self.is_quiet:
            return
        under_way = self._tasks[-1:]  # a copy: this is asked from a thread, and a task may end meanwhile
        if under_way:
            self.say(under_way[0].line())
        elif self._before:
            self.say(f"what follows {self._before}: under way")


class _PlainTask:
    def __init__(self, plain: PlainProgress, name: str, total: int) -> None:
        self._plain, self._name, self._total = plain, name, total
        self._done, self._note = 0, ""
        self._started = self._advanced = plain.clock()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done, self._note = self._done + steps, note
        self._advanced = self._plain.clock()
        if self._done < self._total and self._plain.is_quiet:
            self._plain.say(self.line())

    def line(self) -> str:
        """How far it is, and for how long yet: by the steps that are done, which may be too little for a longer one."""
        now = self._plain.clock()
        parts = [f"{self._name}: {self._done}/{self._total}" if self._total > 1 else self._name]
        left = (self._advanced - self._started) / max(self._done, 1) * (self._total - self._done) - now + self._advanced
        if left > 0:
            parts.append(f"about {left:.0f} s left")
        else:
            parts.append(f"under way for {now - self._started:.0f} s")
        return ", ".join([*parts, *([self._note] if self._note else [])])


@contextmanager
def _reminding(plain: PlainProgress) -> Iterator[None]:
    """Look once a second, from a thread, whether it is time for a line."""
    ended = Event()

    def watch() -> None:
        while not ended.wait(1.0):
            plain.remind()

    thread = Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
