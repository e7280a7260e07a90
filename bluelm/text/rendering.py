"""Renders chat templates in a child process that can be stopped: `render(source, variables)`.

A checkpoint's template is a program from a stranger. It runs in jinja2's sandbox inside `bluelm.text.sandbox`, with
limits of processor time, memory and output; what goes beyond them, or fails, is an InputError in words.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.system.children import killed, name_of
from bluelm.text.unicode import whole_characters

WAIT_S = 60.0  # of the clock, where the machine is busy; what a template may use is processor time, in the sandbox
LEAST_OUTPUT, GROWTH = 1 << 20, 8  # characters; a template may repeat what it is given so often
MOST_LINE = 256 << 20  # bytes of an answer
ROOT = Path(__file__).parents[2]
THEN = datetime(2024, 7, 26)  # a day for chats whose tokens must be the same tomorrow: Llama 3.1's template's own
FIX = "take the chat template of the original checkpoint"


def render(source: str, variables: Mapping[str, Any], where: object = None, now: datetime = THEN) -> str:
    """The text of a template.

    Args:
        source: Jinja.
        variables: JSON values by name: messages, tools, bos_token, …
        where: told with an error.
        now: what `strftime_now` tells.

    Raises:
        InputError: the template raises, is not Jinja, writes half of a character, or needs more time, memory or
            output than it may.
    """
    given = json.dumps({"template": source, "variables": variables})
    most = LEAST_OUTPUT + GROWTH * len(given)
    request = json.dumps({"template": source, "variables": variables, "most": most, "now": now.isoformat()})
    found = json.loads(_child(os.getpid()).ask(request, where))
    if "refused" in found:
        raise InputError(f"the chat template takes no such chat: {found['refused']}", where=where)
    if "error" in found:
        raise InputError(f"the chat template fails: {found['error']}", where=where, fix=FIX)
    return whole_characters(found["text"], where)


@lru_cache(maxsize=1)
def _child(process: int) -> _Child:
    """The sandbox of this process; a fork gets its own."""
    del process
    return _Child()


class _Child:
    """A sandbox that is started at the first request, and again behind a template that ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, request: str, where: object) -> bytes:
        """The answer's line.

        Raises:
            InputError: the template ended the sandbox, or it does not answer.
        """
        with self._lock:
            process = self._process or self._start()
            try:
                return _exchange(process, request.encode() + b"\n")
            except (BrokenPipeError, EOFError, TimeoutError) as error:
                self.close()
                raise _ended(process.returncode, error, where) from None
            except BaseException:  # interrupted between question and answer
                self.close()
                raise

    def close(self) -> None:
        """End the sandbox."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                time.sleep(0.01)  # what it died of is told by the system a moment behind its closed pipe
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # what was not sent
                        pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "bluelm.text.sandbox"]
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
        return self._process


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """Send a line and read one.

    Raises:
        BrokenPipeError, EOFError: the process ended. TimeoutError: it is silent.
    """
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(request)
    process.stdin.flush()
    out, held, end = process.stdout.fileno(), bytearray(), time.monotonic() + WAIT_S
    while not held.endswith(b"\n"):
        if not select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(out, 1 << 20)
        if not piece:
            raise EOFError
        held += piece
        if len(held) > MOST_LINE:
            raise EOFError
    return bytes(held)


def _ended(code: int, error: Exception, where: object) -> Exception:
    """Why the sandbox gave no answer."""
    if code == -signal.SIGPROF:
        return InputError("the chat template runs without an end", where=where, fix=FIX)
    if isinstance(error, TimeoutError):
        return InputError(f"the chat template gives no answer in {WAIT_S:g} s", where=where, fix=FIX)
    outside = killed("the chat template's process", code)
    return outside or InputError(f"the chat template ended its process ({name_of(code)})", where=where, fix=FIX)
