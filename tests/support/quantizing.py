"""Quantizing that is stopped, and what it left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Stopping:
    """A Progress that interrupts the run behind `steps` pieces (0: never), as a user's Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.steps, self.notes, self.tasks = steps, list[str](), list[tuple[str, int]]()

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Stopping]:
        self.tasks.append((name, total))
        yield self

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.notes.append(note)
        if len(self.notes) == self.steps:
            raise KeyboardInterrupt
