"""Child processes that a signal ended or stopped: reported as that, never blamed on the model.

SIGKILL is what the system's OOM killer sends; nobody else does unasked. SIGTERM, SIGINT and SIGHUP come from a person
or a scheduler: the run is interrupted. What remains (SIGSEGV, SIGABRT, …) is the program's own crash.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from bluelm.errors import ExportError, InterruptedRun
from bluelm.system.memory import shortage

HEARTBEAT_S = 2.0
FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
log = logging.getLogger("bluelm_export")


def name_of(code: int) -> str:
    """How a return code reads: "SIGSEGV" or "exit code 3"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def killed(what: str, code: int, where: object = None) -> ExportError | None:
    """The error of a child that something else ended; None for one that ended by itself.

    Args:
        what: the child in words. code: as `subprocess` has it: below 0 for a signal.
    """
    number = code - 128 if code > 128 else -code  # behind a shell or a wrapper it is 128 more
    if number == signal.SIGKILL:
        return shortage(f"{what} was killed (SIGKILL), mostly a sign that", where)
    if number in FROM_OUTSIDE:
        fix = "give the same command again; what is finished is kept"
        return InterruptedRun(f"{what} was terminated from outside ({name_of(-number)})", where=where, fix=fix)
    return None


class Watch:
    """Notices that a child was stopped (SIGSTOP, Ctrl-Z, a debugger), and says so once."""

    def __init__(self, pid: int, what: str) -> None:
        self.pid, self._what = pid, what
        self.stopped = False

    def look(self) -> None:
        """Call it while waiting, every `HEARTBEAT_S` or so."""
        try:
            status = psutil.Process(self.pid).status()
        except psutil.Error:
            return
        stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        if stopped and not self.stopped:
            text = "%s (process %d) is stopped; `kill -CONT %d` lets it go on"
            log.warning(text, self._what, self.pid, self.pid)
        elif self.stopped and not stopped:
            log.warning("%s (process %d) goes on", self._what, self.pid)
        self.stopped = stopped

    def silent(self) -> ExportError | None:
        """The error of a child that is past its time because it stands still; None where it does not."""
        self.look()
        fix = f"kill -CONT {self.pid} lets it go on; or give the same command again: what is finished is kept"
        return InterruptedRun(f"{self._what} was stopped from outside", fix=fix) if self.stopped else None


def run(
    command: Sequence[str],
    what: str,
    *,
    limit_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with its output as text, watched.

    Args:
        what: the program in words.

    Raises:
        OutOfMemoryError: it was killed. InterruptedRun: it was ended, or stopped beyond its time.
        subprocess.TimeoutExpired: it took more than `limit_s` seconds; it is gone then.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, errors="replace", env=environment, cwd=folder
    )
    watch, begun = Watch(process.pid, what), time.monotonic()
    try:
        while True:
            left = HEARTBEAT_S if limit_s is None else min(HEARTBEAT_S, begun + limit_s - time.monotonic())
            try:
                out, err = process.communicate(timeout=max(left, 0))
                break
            except subprocess.TimeoutExpired:
                watch.look()
                if limit_s is not None and time.monotonic() - begun > limit_s:
                    raise watch.silent() or subprocess.TimeoutExpired(list(command), limit_s) from None
    except BaseException:
        process.kill()
        process.communicate()
        raise
    error = killed(what, process.returncode)
    if error is not None:
        raise error
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)
