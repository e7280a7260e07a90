"""The interface by which long work reports progress; the terminal bar and CI's plain lines are in `pipeline`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of long work under way."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Say that `steps` more of the total are done; `note` is what is being done now."""
        ...


class Progress(Protocol):
    """Opens tasks: `with progress.task("quantize", total=6) as task: task.advance(note="block 0")`."""

    def task(self, name: str, total: int) -> AbstractContextManager[Task]: ...


class _SilentTask:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass


class Silent:
    """A `Progress` that says nothing: for library use and tests."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        yield _SilentTask()
