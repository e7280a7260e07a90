"""Vendor libraries run in a child process: typed messages, a time limit, and the log kept.

A child is a Python module with `serve(handle)` under `__main__`. Its messages are the dataclasses that the
caller and the module agree on. What it prints, and what its libraries print, goes to the log file. A crash,
a hang and a failure that the child reports all become errors that a user can act on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bluelm import errors
from bluelm.errors import ExportError, TargetError
from bluelm.system.children import HEARTBEAT_S, Watch, killed, name_of
from bluelm.system.memory import is_shortage, shortage_of

ROOT = Path(__file__).parents[2]
KINDS = ("ExportError", "InputError", "OutOfMemoryError", "TargetError", "UnavailableError")
TAIL, TAIL_BYTES = 8, 1 << 16


@dataclass(frozen=True)
class Failure:
    """An `ExportError` on its way to the parent; `kind` is the class's name."""

    kind: str
    problem: str
    where: str | None
    fix: str | None


class Child:
    """The parent's end. One call at a time.

    Attributes:
        log: what the child prints.
        failed: it crashed or hung; then the log is worth keeping.
    """

    def __init__(
        self,
        module: str,
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        core: int | None = None,
        python: str = sys.executable,
    ) -> None:
        """Start it.

        Args:
            core: the one that all its threads share. Default: any.
            python: the interpreter that runs it, of the same version as this one.
        """
        self.log = log
        self._module = module
        self._connection, theirs = Pipe()
        settings = {**os.environ, **(environment or {})}
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [settings.get("PYTHONPATH"), str(ROOT)]))
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [python, "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=settings,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        if core is not None:  # before it has begun to start threads, which inherit this
            os.sched_setaffinity(self._process.pid, {core})
        theirs.close()
        self.failed = False
        self._watch = Watch(self._process.pid, module)
        self._end = weakref.finalize(self, _end, self._process, self._connection)

    def call(self, message: object, limit_s: float) -> Any:
        """Send a message and wait for the answer.

        Raises:
            ExportError: what the child reports.
            TargetError: it crashed, or did not answer within `limit_s` seconds; then it is gone.
            OutOfMemoryError: its memory ran out, or it was killed. InterruptedRun: something else ended or stopped it.
        """
        if self._connection.closed:
            raise TargetError(f"{self._module} has ended already", where=self.log)
        try:
            self._connection.send(message)
            if not self._answers(limit_s):
                self.failed = True
                stopped = self._watch.silent()
                self.close()
                raise stopped or TargetError(
                    f"{self._module} did not answer {type(message).__name__} within {limit_s:g} s",
                    where=self.log,
                    fix="give it more time, or a smaller model",
                )
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._crashed(message) from None
        except BaseException:
            self.close()  # interrupted half-way: the next answer would be this call's
            raise
        if isinstance(answer, Failure):
            raise getattr(errors, answer.kind)(answer.problem, where=answer.where, fix=answer.fix)
        return answer

    def close(self) -> None:
        """End the child; calling again does nothing."""
        self._end()

    def tail(self, lines: int = TAIL) -> str:
        """The end of the log."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:  # a child may have written gigabytes
            file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode(errors="replace")
        return "\n".join(line for line in text.splitlines()[-lines:] if line.strip())

    def _answers(self, limit_s: float) -> bool:
        """Wait for an answer; a stopped child is reported."""
        end = time.monotonic() + limit_s
        while True:
            left = end - time.monotonic()
            if self._connection.poll(min(max(left, 0), HEARTBEAT_S)):
                return True
            if left <= 0:
                return False
            self._watch.look()

    def _crashed(self, message: object) -> ExportError:
        self.failed = True
        code = self._process.wait()
        self.close()
        return killed(self._module, code, self.log) or TargetError(
            f"{self._module} died ({name_of(code)}) at {type(message).__name__}; its last words:\n{self.tail()}",
            where=self.log,
            fix="the log may say why",
        )


def next_core() -> int:
    """One of the cores that this process may use, in turn."""
    return next(_cores)


def _in_turn() -> Iterator[int]:
    """Processes that begin together begin at different cores."""
    allowed = sorted(os.sched_getaffinity(0))
    yield from islice(cycle(allowed), os.getpid() % len(allowed), None)


_cores = _in_turn()


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    """Closing the pipe ends an idle child; a busy one is killed."""
    connection.close()
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def serve(handle: Callable[[Any], object], arguments: Sequence[str]) -> None:
    """The child's loop: answer messages until the parent closes the pipe.

    An `ExportError` and a shortage of memory become a `Failure`; any other exception ends the child with its traceback
    in the log.
    """
    connection = Connection(int(arguments[1]))
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            answer = handle(message)
        except Exception as error:
            if not isinstance(error, ExportError) and not is_shortage(error):
                raise
            answer = _failure(shortage_of(error) if is_shortage(error) else error)
        connection.send(answer)


def _failure(error: BaseException) -> Failure:
    assert isinstance(error, ExportError)
    kind = type(error).__name__
    return Failure(kind if kind in KINDS else "ExportError", error.problem, error.where, error.fix)
