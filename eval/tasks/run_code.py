"""Runs a program that a model wrote in a child process with limits. It is still untrusted code.

The child gets an empty folder, an empty environment, no standard streams, and limits on time, memory, files and
processes. It is not cut off from the network: where that matters, run the whole job in a container without one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# reads limits and program from standard input; only a program that ran to its end gets to the last line
_RUNNER = """
import json, os, resource, sys
job = json.load(sys.stdin)
for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
done = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
exec(compile(job["program"], "<answer>", "exec"), {"__name__": "__main__"})
os.write(done, job["word"].encode())
"""
SECONDS = 10.0
TASKS = 256  # more than the user has already
PATIENCE = 10  # a busy machine gives it its seconds late; a program that only waits ends by this
MEMORY = 1 << 30


def passes(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Whether `program` runs to its end without an exception, within its limits.

    A program that leaves early, `sys.exit(0)` or `os._exit(0)`, does not pass.

    Args:
        program: Python source.
        seconds: of processor, and `PATIENCE` times that of wall clock. memory: bytes of address space.
    """
    limits = {
        "RLIMIT_CPU": int(seconds) + 1,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": 1 << 20,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_NPROC": _tasks() + TASKS,
        "RLIMIT_CORE": 0,
    }
    word = secrets.token_hex(16)
    job = json.dumps({"program": program, "limits": limits, "word": word}).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory(prefix="bluelm-code-") as folder, tempfile.TemporaryFile() as told:
        with tempfile.TemporaryFile() as given:  # files, not pipes: nobody it forks can keep us waiting
            given.write(job)
            given.seek(0)
            child = subprocess.Popen(
                [sys.executable, "-I", "-c", _RUNNER],
                stdin=given,
                stdout=told,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath},
                start_new_session=True,
            )
        try:
            code = child.wait(PATIENCE * seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)
        told.seek(0)
        return code == 0 and told.read() == word.encode()


def _tasks() -> int:
    """Processes and threads of this user: the limit on them (`setrlimit(2)`) counts all, not those of one program."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            count += len(list((process / "task").iterdir())) if process.stat().st_uid == os.getuid() else 0
    return count


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
