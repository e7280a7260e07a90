"""Faults done to `quantize` and to whole runs, in turn and at random: what was kept, and what comes out afterwards.

    python -m benchmarks.faults OUT [--only SUBJECT ...] [--fault NAME ...] [--share N/M] [--most N] [--each N]

A trial does one fault (`FAULTS`) to one command (`subjects`), then gives the same command again without any, and holds
all that lies there against an undisturbed run. What is in OUT/trials.jsonl is not done again; `--share 1/2` and
`--share 2/2` may run beside each other, in folders of their own. The full disk needs root, or it is left out.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gate_bench import Results
from tests.support.faults import faulty
from tests.support.faults.faulty import Command, Control, Ended

LAX = """
max_perplexity_ratio: 4
max_mean_kl: 2
max_prefill_decode_kl: 0.01
min_decode_tokens_per_s: {at_least: 0.001, where: host}
max_artifact_bytes: 50 MB
max_memory_bytes: 1 GB
"""
QUICK = (
    "--samples 4 --length 32 --eval-tokens 256 --context 128 --budget lax.yaml --calibration cal.txt --eval eval.jsonl"
)
TOLD = ("report.json", "report.html", "junit.xml", "summary.md", "log.txt", ".stages/report", ".stages/lock")
"""Files of a run with clocks, speeds or memory in them; of report.json the rest is compared."""
NOTE = "a file of the user's"
PARTS = 5  # of the series, each with a share of all faults
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A command, and the folder that it fills.

    Attributes:
        few: it has children, and takes so long that few trials must do.
    """

    name: str
    words: tuple[str, ...]
    out: str
    few: bool = False

    @property
    def is_run(self) -> bool:
        return self.words[0] != "quantize"


def subjects() -> list[Subject]:
    """`quantize`, and whole runs on runtimes that load their artifact in this process, or in a child."""

    def run(target: str, runtime: str, few: bool = False, more: str = "") -> Subject:
        words = f"--target {target} --runtime {runtime} --name run --out dist --model run-model {QUICK} {more}"
        return Subject(runtime, tuple(words.split()), "dist/run", few)

    return [
        Subject("quantize", ("quantize", "model", "out", "--samples", "8", "--length", "16"), "out"),
        run("generic-arm64", "onnx-cpu"),
        run("generic-arm64", "gguf"),
        run("generic-arm64", "litert"),
        run("snapdragon", "qnn-context", True, "--npu-tokens 256"),
    ]


@dataclass
class Bench:
    """Where trials take place; `inputs` are the commands' own."""

    out: Path
    control: Control
    work: Path = field(init=False)

    def __post_init__(self) -> None:
        self.work = self.out / f"work-{os.getpid()}"

    @property
    def inputs(self) -> Path:
        return self.out / "inputs"

    def fresh(self, place: Path | None = None) -> Path:
        """A folder with links to the inputs, and nothing else but a file of the user's."""
        folder = place or self.work
        if place is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for path in self.inputs.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "dist").mkdir()
        for note in (folder / "notes.txt", folder / "dist" / "notes.txt"):
            note.write_text(NOTE)
        return folder


def make_inputs(folder: Path) -> None:
    """Two tiny checkpoints, texts and a budget."""
    from bluelm.system.files import demo_checkpoint
    from tests.support.checkpoints.shapes import write_checkpoint
    from tests.support.checkpoints.tiny import tiny_checkpoint

    if folder.exists():
        return
    begun = folder.with_name("inputs.begun")
    shutil.rmtree(begun, ignore_errors=True)
    write_checkpoint(begun / "model", layers=3)
    tiny_checkpoint(begun / "run-model")
    text = (demo_checkpoint() / "README.md").read_text(encoding="utf-8").split("\n\n")
    (begun / "cal.txt").write_text("\n\n".join(text[::2]), encoding="utf-8")
    records = [json.dumps({"text": part[:150]}, ensure_ascii=False) for part in text[1::2]]
    (begun / "eval.jsonl").write_text("\n".join(records), encoding="utf-8")
    (begun / "lax.yaml").write_text(LAX)
    begun.rename(folder)


@dataclass(frozen=True)
class Whole:
    """An undisturbed run of a subject.

    Attributes:
        files: digest by name of all that is compared.
        writes, reads: operations on its files, and on those of its inputs, that the shim sees.
        clocks: how often it reads the wall clock.
    """

    code: int
    seconds: float
    files: dict[str, str]
    writes: int
    reads: int
    clocks: int


def undisturbed(bench: Bench, subject: Subject) -> Whole:
    """The run that others are held against; done twice, the second with its reads counted: they agree."""
    found: list[tuple[Ended, dict[str, str], int]] = []
    clocks = 0
    for kinds, under in ((faulty.WRITE, bench.work), (faulty.READ, bench.inputs)):
        folder = bench.fresh()
        bench.control.set(under, kinds=kinds, clock_at=1 << 62)
        ended = faulty.run(subject.words, folder)
        found.append((ended, content(folder / subject.out), bench.control.seen))
        clocks = bench.control.clock_seen
    (first, files, writes), (second, again, reads) = found
    assert first.code in (0, 3) and first.code == second.code, first.said
    assert files == again, f"{subject.name}: two undisturbed runs differ in {differing(files, again)}"
    return Whole(first.code, min(first.seconds, second.seconds), files, writes, reads, clocks)


def content(folder: Path) -> dict[str, str]:
    """Digests of all files by name; of a report, of what no clock decides; of a bundle, that it is whole."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("previous/"):
            continue
        data = path.read_bytes()
        if name == "report.json":
            data = json.dumps(steady(json.loads(data)), sort_keys=True).encode()
        elif name in TOLD:
            data = b"there"
        elif name.startswith("bundle/") and path.suffix == ".apk":
            from export.bundle import build

            made = build.verify(path).manifest  # the measured speed stands in it
            data = json.dumps({name: file.sha256 for name, file in made.files.items()}, sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def steady(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what clocks and the machine's load decide."""
    kept = {key: value for key, value in report.items() if key not in ("stages", "measurements", "checks")}
    figures = [m for m in report["measurements"] if m["subject"] not in ("host", "run")]
    checks = [(check["name"], check["outcome"]) for check in report["checks"]]
    return {**kept, "measurements": figures, "checks": checks}


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def finished(folder: Path, subject: Subject) -> dict[str, int]:
    """Finished pieces (with their digest) and files of finished stages, by their inode: nothing of them may be lost."""
    if not subject.is_run:
        place = folder / f"{subject.out}.partial"
        notes = place.glob("*.sha256")
        paths = [note.with_suffix("") for note in notes] + list((folder / subject.out).glob("*.safetensors"))
        return {path.name: path.stat().st_ino for path in paths if path.is_file()}
    run = folder / subject.out
    stages = [record.stem for record in (run / ".stages").glob("*.json")]
    files = [path for stage in stages for path in (run / stage).rglob("*") if path.is_file()]
    return {path.relative_to(run).as_posix(): path.stat().st_ino for path in files}


# --- faults ---------------------------------------------------------------------------------------------------------

Done = tuple[Ended, str]  # how the disturbed command ended, and where it was hit ("" if it was not)
Fault = Callable[[Bench, Subject, Whole, random.Random, Path], Done]


def at_a_moment(*numbers: int) -> Fault:
    """A signal to the process group, and SIGKILL to its children as well, at any time of the run."""

    def do(bench: Bench, subject: Subject, whole: Whole, draw: random.Random, folder: Path) -> Done:
        number, moment, hit = draw.choice(numbers), draw.uniform(0, whole.seconds), [""]
        command = Command(subject.words, folder)

        def strike(seconds: float) -> None:
            if not hit[0] and seconds >= moment:
                hit[0] = f"{signal.Signals(number).name} after {seconds:.2f} of {whole.seconds:.2f} s"
                command.kill(number)

        return command.wait(strike), hit[0]

    return do


def to_a_child(bench: Bench, subject: Subject, whole: Whole, draw: random.Random, folder: Path) -> Done:
    """SIGKILL to one of the processes that the command started."""
    moment, hit = draw.uniform(0, 0.7 * whole.seconds), [""]
    command = Command(subject.words, folder)

    def strike(seconds: float) -> None:
        children = command.children() if not hit[0] and seconds >= moment else []
        if children:
            hit[0] = f"a child after {seconds:.2f} s"
            draw.choice(children).kill()

    return command.wait(strike), hit[0]


def by_shim(action: int, kinds: int, *numbers: int, lasting: bool = False) -> Fault:
    """Something at one of the command's operations on files: its own for writes, its inputs' for reads alone.

    Args:
        lasting: every operation from there on fails.
    """

    def do(bench: Bench, subject: Subject, whole: Whole, draw: random.Random, folder: Path) -> Done:
        under, count = (bench.inputs, whole.reads) if kinds == faulty.READ else (folder, whole.writes)
        at, number = draw.randint(1, count), draw.choice(numbers)
        until = 1 << 62 if lasting else at
        bench.control.set(under, kinds=kinds, action=action, number=number, at=at, until=until)
        ended = faulty.run(subject.words, folder)
        hit = f"{bench.control.what.decode()} (operation {at} of {count})" if bench.control.fired else ""
        return ended, hit

    return do


def clock_back(bench: Bench, subject: Subject, whole: Whole, draw: random.Random, folder: Path) -> Done:
    """The wall clock goes back, by a minute to thirty years."""
    back, at = draw.choice((60, 86_400, 400 * 86_400, 30 * 365 * 86_400)), draw.randint(1, max(whole.clocks, 1))
    bench.control.set(folder, clock_at=at, clock_back=back)
    ended = faulty.run(subject.words, folder)
    return ended, f"{back} s at reading {at}" if bench.control.clock_seen >= at else ""


def full_disk(bench: Bench, subject: Subject, whole: Whole, draw: random.Random, folder: Path) -> Done:
    """Another process fills the disk (a small tmpfs, on which the command works) at some moment."""
    moment, hit, filler = draw.uniform(0, whole.seconds), [""], folder / "others"
    command = Command(subject.words, folder)

    def strike(seconds: float) -> None:
        if not hit[0] and seconds >= moment:
            hit[0] = f"after {seconds:.2f} of {whole.seconds:.2f} s"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    ended = command.wait(strike)
    filler.unlink(missing_ok=True)
    return ended, hit[0]


def flipped(bench: Bench, subject: Subject, whole: Whole, draw: random.Random, folder: Path) -> Done:
    """Killed at some moment, and a bit flipped in one of the files that it left, time stamp kept."""
    ended, _ = at_a_moment(signal.SIGKILL)(bench, subject, whole, draw, folder)
    return ended, flip(folder, draw)


def flipped_afterwards(bench: Bench, subject: Subject, whole: Whole, draw: random.Random, folder: Path) -> Done:
    """A bit flipped in one of the files of a finished run."""
    ended = faulty.run(subject.words, folder)
    return ended, flip(folder, draw)


def flip(folder: Path, draw: random.Random) -> str:
    """Flip a bit in a kept file; which."""
    places = [*folder.glob("out"), *folder.glob("out.partial"), *folder.glob("dist/run")]
    paths = sorted(p for place in places for p in place.rglob("*") if p.is_file() and p.stat().st_size)
    if not paths:
        return ""
    path, before = draw.choice(paths), None
    data, before = bytearray(path.read_bytes()), path.stat()
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"{path.relative_to(folder)}, byte {place} of {len(data)}"


FAULTS: dict[str, tuple[Fault, int, int]] = {
    "kill -9 at a moment": (at_a_moment(signal.SIGKILL), 80, 20),
    "kill -9 at a write": (by_shim(faulty.KILL_GROUP, faulty.WRITE, 0), 60, 15),
    "kill -9 of a child alone": (to_a_child, 0, 6),
    "SIGINT or SIGTERM at a moment": (at_a_moment(signal.SIGINT, signal.SIGTERM), 15, 3),
    "SIGINT or SIGTERM in a read": (by_shim(faulty.SIGNAL, faulty.READ, signal.SIGINT, signal.SIGTERM), 30, 4),
    "a flipped bit behind a kill": (flipped, 30, 5),
    "a flipped bit in a finished folder": (flipped_afterwards, 20, 5),
    "a full disk (tmpfs)": (full_disk, 10, 3),
    "no space at a write and after it": (by_shim(faulty.FAIL, faulty.WRITE, errno.ENOSPC, lasting=True), 15, 4),
    "EIO at a read": (by_shim(faulty.FAIL, faulty.READ, errno.EIO), 15, 4),
    "EIO at a write": (by_shim(faulty.FAIL, faulty.WRITE, errno.EIO), 15, 4),
    "EIO at a write and after it": (by_shim(faulty.FAIL, faulty.WRITE, errno.EIO, lasting=True), 10, 3),
    "the clock goes back": (clock_back, 1, 4),
}
"""What is done, and how many trials of it `quantize` and a run have."""
KILLED = tuple(name for name in FAULTS if name.startswith("kill"))
FLIPS = tuple(name for name in FAULTS if name.startswith("a flipped"))


def trial(bench: Bench, subject: Subject, whole: Whole, name: str, number: int) -> Row:
    """One fault, and the same command again."""
    draw = random.Random(f"{subject.name} {name} {number}")
    mounted = bench.work / "disk" if name == "a full disk (tmpfs)" else None
    folder = bench.fresh()
    if mounted is not None:
        mounted.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mounted], check=True)
        folder = bench.fresh(mounted)
    try:
        bench.control.set()
        first, hit = FAULTS[name][0](bench, subject, whole, draw, folder)
        bench.control.set()
        kept = finished(folder, subject)
        again = faulty.run(subject.words, folder)
        found = content(folder / subject.out) if (folder / subject.out).exists() else {}
        now = finished(folder, subject)
        lost = sorted(path for path, inode in kept.items() if now.get(path) != inode)
        notes = [p for p in (folder / "notes.txt", folder / "dist" / "notes.txt") if p.read_text() == NOTE]
    finally:
        if mounted is not None:
            subprocess.run(["umount", "--lazy", mounted], check=True)
    row = {
        "subject": subject.name, "fault": name, "number": number, "hit": hit,
        "first": first.code, "told": first.problem, "again": again.code, "again_told": again.problem,
        "differing": differing(whole.files, found)[:5], "lost": lost[:5], "kept": len(kept),
        "left": first.left + again.left, "notes": len(notes), "seconds": first.seconds,
    }  # fmt: skip
    row["result"], row["why"] = verdict(row, whole, first, again)
    return row


def verdict(row: Row, whole: Whole, first: Ended, again: Ended) -> tuple[str, str]:
    """ "identical", "clear end", "not hit" or "FAULT", and for the last what is wrong."""
    killed = first.code < 0 and ("kill" in row["fault"] or "killed" in row["fault"])
    wrong: list[str] = []
    if not (killed or first.clear or first.code == whole.code):
        wrong.append(f"ended with {first.code}: {first.problem or first.said[-300:]}")
    if row["left"]:
        wrong.append("processes are left")
    if row["notes"] != 2:
        wrong.append("the user's file is gone")
    if row["lost"] and row["fault"] not in FLIPS:
        wrong.append(f"finished work was done again: {', '.join(row['lost'])}")
    refused = again.code == 2 and again.clear and row["fault"] in FLIPS
    if not refused and (again.code != whole.code or row["differing"]):
        wrong.append(f"afterwards {again.code} {again.problem}, differing: {', '.join(row['differing'])}")
    if wrong:
        return "FAULT", "; ".join(wrong)
    return ("not hit" if not row["hit"] else "clear end" if refused else "identical"), ""


def plan(chosen: list[Subject], root: bool) -> Iterator[tuple[Subject, str, int]]:
    """Trials, all faults in turn, so that a broken-off series has some of each."""
    for part in range(PARTS):
        for subject in chosen:
            for name, (_, single, whole) in FAULTS.items():
                count = whole if subject.is_run else single
                if subject.few:
                    count = count if "child" in name else min(count, 1)
                possible = (root or "tmpfs" not in name) and ("child" not in name or subject.few)
                for number in range(count * part // PARTS, count * (part + 1) // PARTS if possible else 0):
                    yield subject, name, number


def series(
    out: Path,
    only: list[str] | None,
    share: tuple[int, int],
    most: int | None = None,
    each: int | None = None,
    faults: list[str] | None = None,
) -> None:
    """All trials that are not done yet; at most so many in all, or of each fault."""
    bench = Bench(out, faulty.prepare(out / f"shim-{share[0]}"))
    make_inputs(bench.inputs)
    rows = Results(out / f"trials-{share[0]}.jsonl", ("subject", "fault", "number"))
    chosen = [subject for subject in subjects() if not only or subject.name in only]
    wholes: dict[str, Whole] = {}
    mine = [job for index, job in enumerate(plan(chosen, os.geteuid() == 0)) if index % share[1] == share[0] - 1]
    mine = [job for job in mine if (each is None or job[2] < each) and (not faults or job[1] in faults)]
    left = [job for job in mine if {"subject": job[0].name, "fault": job[1], "number": job[2]} not in rows]
    for subject, name, number in left[:most]:
        if subject.name not in wholes:
            wholes[subject.name] = undisturbed(bench, subject)
        rows.add(trial(bench, subject, wholes[subject.name], name, number))
    shutil.rmtree(bench.work, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--fault", nargs="*", help="as `FAULTS` calls it")
    parser.add_argument("--share", default="1/1", help="N/M: the N-th of M parts")
    parser.add_argument("--most", type=int, help="trials of this call")
    parser.add_argument("--each", type=int, help="trials of each fault")
    given = parser.parse_args()
    numbers = re.fullmatch(r"(\d+)/(\d+)", given.share)
    if numbers is None:
        parser.error("--share is N/M")
    series(given.out.resolve(), given.only, (int(numbers[1]), int(numbers[2])), given.most, given.each, given.fault)


if __name__ == "__main__":
    main()
