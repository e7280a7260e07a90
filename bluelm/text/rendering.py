"""Renders chat templates in a child process (`bluelm/text/render_worker.py`), bounded in time, memory and output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.system.children import killed, name_of

ROOT = Path(__file__).parents[2]
WORKER = "bluelm.text.render_worker"
ANOTHER = "take the chat template of the original checkpoint, or correct it"
WALL_S = 60.0  # the child bounds its own CPU time; this is for one that stands still


class RefusedChatError(InputError):
    """The template itself says that it does not hold such a chat (`raise_exception`)."""


def render(source: str, variables: Mapping[str, Any], now: datetime, where: object) -> str:
    """The text of a chat.

    Args:
        source: Jinja. variables: JSON values. now: what the template gets for today. where: named in errors.

    Raises:
        RefusedChatError: the template's own words, why not.
        InputError: it is no Jinja, fails, or takes more time, memory or room than a template needs.
    """
    data = json.dumps({"source": source, "variables": variables, "now": now.isoformat()}).encode()
    answer = _worker(os.getpid()).ask(data, where)
    if "refused" in answer:
        raise RefusedChatError(f"the chat template refuses this chat: {answer['refused']}", where=where)
    if "fault" in answer:
        raise InputError(f"the chat template fails: {answer['fault']}", where=where, fix=ANOTHER)
    if not answer["text"]:
        raise InputError("the chat template writes nothing", where=where, fix=ANOTHER)
    return answer["text"]


class _Worker:
    """The child; started when it is first asked, and again behind one that died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def ask(self, data: bytes, where: object) -> dict[str, str]:
        """The child's answer.

        Raises:
            InputError: the template took too long, or broke the child.
            OutOfMemoryError, InterruptedRun: something else ended it.
        """
        with self._lock:
            process, connection = self._running()
            try:
                with suppress(BrokenPipeError):  # it died meanwhile, so no answer comes
                    connection.send_bytes(data)
                if connection.poll(WALL_S):
                    return json.loads(connection.recv_bytes())
                process.kill()
                late = True
            except (EOFError, ConnectionError):
                late = False
            except BaseException:
                process.kill()  # else its answer would be the next caller's
                raise
            code = process.wait()
        if late or code == -signal.SIGPROF:
            raise InputError("the chat template takes too long", where=where, fix=ANOTHER)
        problem = f"the chat template breaks its interpreter ({name_of(code)})"
        raise killed("the chat template's interpreter", code, where) or InputError(problem, where=where, fix=ANOTHER)

    def _running(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._process is None or self._connection is None or self._process.poll() is not None:
            self._process, self._connection = _start()
            weakref.finalize(self, _end, self._process, self._connection)
        return self._process, self._connection


_worker = cache(lambda process: _Worker())  # one a process: a fork may not talk to its parent's


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    settings = dict(os.environ)
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), settings.get("PYTHONPATH")]))
    nothing = subprocess.DEVNULL
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(theirs.fileno())],
            stdin=nothing, stdout=nothing, stderr=nothing, pass_fds=[theirs.fileno()], env=settings,
            start_new_session=True,
        )  # fmt: skip
    return process, ours


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    """Closing the pipe ends an idle child."""
    connection.close()
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
