"""The faults that `benchmarks.faults` does to a command, and how many trials each has."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults.subjects import Bench, Subject, Whole, kept_files, workers_of
from tests.support.faults import faulty
from tests.support.faults.faulty import Command, Ended

LATE = 0.9  # of all writes of a command
Done = tuple[Ended, str]  # how the disturbed command ended, and where it was hit ("" if it was not)


@dataclass(frozen=True)
class Trial:
    """One fault about to be done to a subject in a fresh folder; `draw` is seeded by all of it."""

    bench: Bench
    subject: Subject
    whole: Whole
    number: int
    folder: Path
    draw: random.Random


Fault = Callable[[Trial], Done]


def at_a_moment(*numbers: int) -> Fault:
    """A signal to the process group, and SIGKILL to its children as well, at any time of the run."""

    def do(of: Trial) -> Done:
        number, moment, hit = of.draw.choice(numbers), of.draw.uniform(0, of.whole.seconds), [""]
        command = Command(of.subject.words, of.folder)

        def strike(seconds: float) -> None:
            if not hit[0] and seconds >= moment:
                hit[0] = f"{signal.Signals(number).name} after {seconds:.2f} of {of.whole.seconds:.2f} s"
                command.kill(number)

        return command.wait(strike), hit[0]

    return do


def to_a_child(of: Trial) -> Done:
    """SIGKILL to one of the processes that do a part of the command's work, and to nothing else."""
    which, pause = of.draw.randrange(max(of.whole.workers, 1)), of.draw.uniform(0, 0.5)
    met: dict[int, float] = {}
    hit, command = [""], Command(of.subject.words, of.folder)

    def strike(seconds: float) -> None:
        for child in () if hit[0] else workers_of(command):
            begun = met.setdefault(child.pid, seconds)
            if len(met) > which and seconds >= begun + pause:
                with suppress(psutil.Error):
                    name = child.cmdline()[child.cmdline().index("-m") + 1]
                    child.kill()
                    hit[0] = f"{name}, {seconds - begun:.2f} s after its begin"
                    return

    return command.wait(strike), hit[0]


def by_shim(action: int, kinds: int, *numbers: int, lasting: bool = False) -> Fault:
    """Something at one of the command's operations on files: its own for writes, its inputs' for reads alone.

    Args:
        lasting: every operation from there on fails.
    """

    def do(of: Trial) -> Done:
        under, count = (of.bench.inputs, of.whole.reads) if kinds == faulty.READ else (of.folder, of.whole.writes)
        at, number = of.draw.randint(1, count), of.draw.choice(numbers)
        until = 1 << 62 if lasting else at
        of.bench.control.set(under, kinds=kinds, action=action, number=number, at=at, until=until)
        ended = faulty.run(of.subject.words, of.folder)
        hit = f"{of.bench.control.what.decode()} (operation {at} of {count})" if of.bench.control.fired else ""
        return ended, hit

    return do


def clock_back(of: Trial) -> Done:
    """The wall clock goes back, by a minute to thirty years."""
    back = of.draw.choice((60, 86_400, 400 * 86_400, 30 * 365 * 86_400))
    at = of.draw.randint(1, max(of.whole.clocks, 1))
    of.bench.control.set(of.folder, clock_at=at, clock_back=back)
    ended = faulty.run(of.subject.words, of.folder)
    return ended, f"{back} s at reading {at}" if of.bench.control.clock_seen >= at else ""


def full_disk(of: Trial) -> Done:
    """Another process fills the disk (a small tmpfs, on which the command works) at some moment."""
    moment, hit, filler = of.draw.uniform(0, of.whole.seconds), [""], of.folder / "others"
    command = Command(of.subject.words, of.folder)

    def strike(seconds: float) -> None:
        if not hit[0] and seconds >= moment:
            hit[0] = f"after {seconds:.2f} of {of.whole.seconds:.2f} s"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    ended = command.wait(strike)
    filler.unlink(missing_ok=True)
    return ended, hit[0]


def flipped(of: Trial) -> Done:
    """Killed at some moment, and a bit flipped in one of the files that it left, time stamp kept."""
    ended, _ = at_a_moment(signal.SIGKILL)(of)
    return ended, flip(of)


def flipped_afterwards(of: Trial) -> Done:
    """A bit flipped in one of the files of a finished run."""
    ended = faulty.run(of.subject.words, of.folder)
    return ended, flip(of)


def each_flipped(of: Trial) -> Done:
    """Killed always at the same write, late, and a bit flipped in the file of the trial's number."""
    return killed_late(of), flip(of, of.number)


def killed_late(of: Trial) -> Ended:
    """SIGKILL at a write that is `LATE` of all."""
    at = max(1, int(LATE * of.whole.writes))
    of.bench.control.set(of.folder, kinds=faulty.WRITE, action=faulty.KILL_GROUP, at=at, until=at)
    return faulty.run(of.subject.words, of.folder)


def each_flipped_afterwards(of: Trial) -> Done:
    """A bit flipped in the file of the trial's number, of a copy of a finished folder."""
    finished = of.bench.out / f"finished-{of.subject.name}"
    if not finished.exists():
        ended = faulty.run(of.subject.words, of.folder)
        assert ended.code == of.whole.code, ended.said
        shutil.copytree(of.folder / of.subject.out, finished, symlinks=True)
    else:
        shutil.copytree(finished, of.folder / of.subject.out, symlinks=True)
    return Ended(of.whole.code, "", 0), flip(of, of.number)


def flip(of: Trial, index: int | None = None) -> str:
    """Flip a bit in the kept file of this place in their order (default: drawn), somewhere in it; which."""
    paths = kept_files(of.folder)
    if not paths or (index is not None and index >= len(paths)):
        return ""
    path = of.draw.choice(paths) if index is None else paths[index]
    data, before = bytearray(path.read_bytes()), path.stat()
    place = of.draw.randrange(len(data))
    data[place] ^= 1 << of.draw.randrange(8)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"{path.relative_to(of.folder)}, byte {place} of {len(data)}"


FAULTS: dict[str, tuple[Fault, int, int]] = {
    "kill -9 at a moment": (at_a_moment(signal.SIGKILL), 80, 20),
    "kill -9 at a write": (by_shim(faulty.KILL_GROUP, faulty.WRITE, 0), 60, 15),
    "kill -9 of a child alone": (to_a_child, 0, 6),
    "SIGINT or SIGTERM at a moment": (at_a_moment(signal.SIGINT, signal.SIGTERM), 15, 3),
    "SIGINT or SIGTERM in a read": (by_shim(faulty.SIGNAL, faulty.READ, signal.SIGINT, signal.SIGTERM), 30, 4),
    "a flipped bit behind a kill": (flipped, 30, 5),
    "a flipped bit in a finished folder": (flipped_afterwards, 20, 5),
    "a flipped bit in each file behind a kill": (each_flipped, 0, 0),
    "a flipped bit in each file of a finished folder": (each_flipped_afterwards, 0, 0),
    "a full disk (tmpfs)": (full_disk, 10, 3),
    "no space at a write and after it": (by_shim(faulty.FAIL, faulty.WRITE, errno.ENOSPC, lasting=True), 15, 4),
    "EIO at a read": (by_shim(faulty.FAIL, faulty.READ, errno.EIO), 15, 4),
    "EIO at a write": (by_shim(faulty.FAIL, faulty.WRITE, errno.EIO), 15, 4),
    "EIO at a write and after it": (by_shim(faulty.FAIL, faulty.WRITE, errno.EIO, lasting=True), 10, 3),
    "the clock goes back": (clock_back, 1, 4),
}
"""What is done, and how many trials of it `quantize` and a run have; of those in `EACH`, as many as there are files."""
EACH = tuple(name for name in FAULTS if "in each file" in name)
CHILD = "kill -9 of a child alone"
KILLED = tuple(name for name in FAULTS if name.startswith("kill"))
FLIPS = tuple(name for name in FAULTS if name.startswith("a flipped"))
