"""Families of hostile inputs for one reader, read in a forked process with limits; what went wrong, input by input.

An input may be accepted, or end with a code of `CLEAR` and a message. A fault is any exception (a traceback), more than
`SECONDS` of processor time (on slower machines more) or `WALL_S` of waiting, more than `MEMORY_MB` above what the
process had before, a file written outside the folder of the reader, a message with control characters or a line that a
CI system obeys.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.fuzz import Watch
from pipeline.errors import guard
from tests.hostile.rows import FEW, SLOW, Put, Row
from tests.support import readers
from tests.support.readers import READERS, Reader

SECONDS, WALL_S, MEMORY_MB = 2, 120, 500  # a second, and another to spare, on a machine as fast as `WORK_S` says
WORK_S = 0.15  # of `_work` on such a machine; slower and busier ones are given so many times as long
CLEAR = (0, 2, 4, 5)
HARD_MB = 3000  # behind this the process gets no memory at all
HARD_S = 30  # behind this it is ended
FORBIDDEN = {chr(code) for code in [*range(32), *range(127, 160)]} - {"\n", "\t"} | {"\u202e", "\u2066", "\u2067"}


@dataclass(frozen=True)
class Judged:
    """What a family came to.

    Attributes:
        faults: inputs that were faults, and how.
    """

    row: str
    inputs: int
    refused: int
    slowest_s: float
    memory_mb: float
    faults: tuple[str, ...]


def judge(rows: Sequence[Row], most: Callable[[Row], int | None] = lambda row: None) -> list[Judged]:
    """Read every input of families of one reader in one process, or so many of each family, drawn."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        said, result = Path(place) / "said", Path(place) / "result"
        result.touch()
        child = os.fork()
        if child == 0:
            _in_child(rows, most, Path(place), said, result)
        status = _waited(child, result)
        found = [json.loads(line) for line in result.read_text().splitlines()]
        faults = {row.name: [f"{x['name']}: {x['fault']}" for x in _of(row, found) if x.get("fault")] for row in rows}
        if status != 0:
            begun = found[-1] if found and "seconds" not in found[-1] else {"row": rows[0].name, "name": "?"}
            how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            told = f"{begun['name']}: the process ended with {how}: {said.read_text(errors='replace')[-500:]}"
            faults[begun["row"]].append(told)
        return [_judged(row, found, faults[row.name]) for row in rows]


def _of(row: Row, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in found if each["row"] == row.name]


def _judged(row: Row, found: list[dict[str, Any]], faults: list[str]) -> Judged:
    done = [each for each in _of(row, found) if "seconds" in each]
    slowest, peak = (max((float(each[name]) for each in done), default=0.0) for name in ("seconds", "memory"))
    return Judged(row.name, len(done), sum(each["refused"] for each in done), slowest, peak, tuple(faults))


def _waited(child: int, result: Path) -> int:
    """Its exit code, or minus the signal that ended it; when it writes nothing for too long it is killed."""
    size, until = -1, 0.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if (now := result.stat().st_size) != size:
            size, until = now, time.monotonic() + WALL_S
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _in_child(
    rows: Sequence[Row], most: Callable[[Row], int | None], place: Path, said: Path, result: Path
) -> NoReturn:
    code = 70
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit = (_memory("VmData") + HARD_MB) << 20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        _read_all(rows, most, place, result)
        code = 0
    except BaseException:  # noqa: BLE001 - the parent tells it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _read_all(rows: Sequence[Row], most: Callable[[Row], int | None], place: Path, result: Path) -> None:
    reader = READERS[rows[0].reader]()
    home = place / "home"
    tempfile.tempdir = str(place)
    watch = Watch(place)
    readers.allowed(reader, readers.fresh(reader, home), reader.seed)  # what its libraries take is taken
    with result.open("w") as out:
        for row in rows:
            for name, put in _drawn(row, reader, most(row)):
                about = {"row": row.name, "name": name}
                out.write(json.dumps(about) + "\n")
                out.flush()
                readers.fresh(reader, home)
                put(home / reader.target, reader.seed)
                _limit_seconds()
                out.write(json.dumps({**about, **_read_one(reader, home, watch)}) + "\n")
                out.flush()


def _drawn(row: Row, reader: Reader, most: int | None) -> list[tuple[str, Put]]:
    inputs = list(row.inputs(reader))
    most = min(most or len(inputs), FEW if row.reader in SLOW else len(inputs))
    return random.Random(row.name).sample(inputs, most) if most < len(inputs) else inputs


def _limit_seconds() -> None:
    """A signal that ends the process after some more seconds of processor time."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    until = int(spent.ru_utime + spent.ru_stime + HARD_S) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))


def _read_one(reader: Reader, home: Path, watch: Watch) -> dict[str, Any]:
    """Seconds, memory and faults of one input."""
    _reset_peak()
    before, began, faults = _memory("VmRSS"), _cpu_seconds(), list[str]()
    watch.found.clear()
    watch.armed, said, code = True, io.StringIO(), 0
    try:
        with redirect_stderr(said):
            code = guard(lambda: _nothing(reader.read(home)), "again")
        if code == 0 and reader.exact and _is_changed(reader, home):
            faults.append("a changed bundle was accepted")
    except BaseException as error:  # noqa: BLE001 - the fault itself
        last = traceback.extract_tb(error.__traceback__)[-1]
        faults.append(f"{type(error).__name__}: {str(error)[:200]!a} ({Path(last.filename).name}:{last.lineno})")
    finally:
        watch.armed = False
    faults += unclean(said.getvalue())
    if code not in CLEAR:
        faults.append(f"ended with {code}: {said.getvalue()[:300]!a}")
    seconds, memory = _cpu_seconds() - began, _memory("VmHWM") - before
    faults += [f"wrote {path}" for path in watch.found[:3]]
    if seconds > SECONDS and seconds > SECONDS * _slowness():
        faults.append(f"took {seconds:.1f} s")
    if memory > MEMORY_MB:
        faults.append(f"took {memory} MB")
    return {"seconds": round(seconds, 3), "memory": memory, "refused": code != 0, "fault": "; ".join(faults)}


def _cpu_seconds() -> float:
    """Of this process and of children that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@cache
def _slowness() -> float:
    """How many times as long as `WORK_S` this process takes for the same; at least 1."""
    began, total = time.process_time(), 0
    for number in range(2_000_000):
        total += number * number % 7
    return max(1.0, (time.process_time() - began) / WORK_S)


def _nothing(value: object) -> None:
    """Whatever a reader returned."""


def _is_changed(reader: Reader, home: Path) -> bool:
    path = home / reader.target
    return not path.is_file() or path.stat().st_size != len(reader.seed) or path.read_bytes() != reader.seed


def unclean(message: str) -> list[str]:
    """What a terminal or a CI system would obey in a message."""
    found = sorted({f"U+{ord(letter):04X}" for letter in message if letter in FORBIDDEN})
    faults = [f"control characters in the message: {', '.join(found)}"] if found else []
    if any(line.lstrip().startswith("::") for line in message.splitlines()):
        faults.append("a line of the message is an order to GitHub")
    return faults


def _memory(name: str) -> int:
    """MiB, from /proc."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) >> 10


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
