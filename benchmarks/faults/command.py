"""Faults done to `quantize` and to whole runs, in turn and at random: what was kept, and what comes out afterwards.

    python -m benchmarks.faults OUT [--only SUBJECT ...] [--fault NAME ...] [--share N/M] [--most N] [--each N]

A trial does one fault (`benchmarks/faults/kinds.py`) to one command (`benchmarks/faults/subjects.py`), then gives the
same command again without any, and compares all that lies there with an undisturbed run. What is in OUT/trials-1.jsonl
is not done again; `--share 1/2` and `--share 2/2` may run beside each other, in folders of their own. The full disk
needs root, and is skipped without.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.kinds import CHILD, EACH, FAULTS, FLIPS, Trial, each_flipped, killed_late
from benchmarks.faults.subjects import (
    NOTE,
    Bench,
    Subject,
    Whole,
    content,
    differing,
    finished,
    kept_files,
    make_inputs,
    subjects,
    undisturbed,
)
from benchmarks.gate.bench import Results
from tests.support.faults import faulty
from tests.support.faults.faulty import Ended

PARTS = 5  # of the series, each with a share of all faults
Row = dict[str, Any]


def trial(bench: Bench, subject: Subject, whole: Whole, name: str, number: int) -> Row:
    """One fault, and the same command again."""
    mounted = bench.work / "disk" if "tmpfs" in name else None
    folder = bench.fresh()
    if mounted is not None:
        mounted.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mounted], check=True)
        folder = bench.fresh(mounted)
    about = Trial(bench, subject, whole, number, folder, random.Random(f"{subject.name} {name} {number}"))
    try:
        bench.control.set()
        first, hit = FAULTS[name][0](about)
        bench.control.set()
        kept = finished(folder, subject)
        again = faulty.run(subject.words, folder)
        found = content(folder / subject.out, subject.compiled) if (folder / subject.out).exists() else {}
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
    if row["fault"] == CHILD and row["hit"] and (first.code not in (2, 6, whole.code) or "cannot hold" in first.said):
        wrong.append(f"a killed child is told as {first.code}: {first.problem or first.said[-300:]}")
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


def plan(chosen: list[Subject], root: bool, files: Callable[[Subject, str], int]) -> Iterator[tuple[Subject, str, int]]:
    """Trials, all faults in turn, so that a broken-off series has some of each.

    Args:
        files: how many a subject has to flip a bit in, for a fault of `EACH`.
    """
    for part in range(PARTS):
        for subject in chosen:
            for name in FAULTS:
                count = _count(subject, name, files) if root or "tmpfs" not in name else 0
                for number in range(count * part // PARTS, count * (part + 1) // PARTS):
                    yield subject, name, number


def _count(subject: Subject, name: str, files: Callable[[Subject, str], int]) -> int:
    """Trials of a fault."""
    _, single, whole = FAULTS[name]
    if name in EACH:
        return files(subject, name) if subject.each else 0
    if name == CHILD:
        return whole if subject.children else 0
    count = whole if subject.is_run else single
    return min(count, 1) if subject.few else count


class Undisturbed:
    """What subjects do when nothing disturbs them, found out when it is asked for; numbers of files stay in OUT."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._wholes = bench, dict[str, Whole]()
        self._path = bench.out / "files.json"
        self._files: dict[str, int] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def whole(self, subject: Subject) -> Whole:
        """The run that others are held against."""
        if subject.name not in self._wholes:
            self._wholes[subject.name] = undisturbed(self._bench, subject)
        return self._wholes[subject.name]

    def files(self, subject: Subject, name: str) -> int:
        """How many files a trial of this fault finds, none of them empty."""
        key = f"{subject.name}, {name}"
        if key not in self._files:
            about = Trial(self._bench, subject, self.whole(subject), 0, self._bench.fresh(), random.Random(0))
            if FAULTS[name][0] is each_flipped:
                killed_late(about)
            else:
                faulty.run(subject.words, about.folder)
            self._bench.control.set()
            self._files[key] = len(kept_files(about.folder))
            self._path.write_text(json.dumps(self._files, indent=1))
        return self._files[key]


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
    subject_of = Undisturbed(bench)
    jobs = enumerate(plan(chosen, os.geteuid() == 0, subject_of.files))
    mine = [job for index, job in jobs if index % share[1] == share[0] - 1]
    mine = [job for job in mine if (each is None or job[2] < each) and (not faults or job[1] in faults)]
    left = [job for job in mine if {"subject": job[0].name, "fault": job[1], "number": job[2]} not in rows]
    for subject, name, number in left[:most]:
        rows.add(trial(bench, subject, subject_of.whole(subject), name, number))
    shutil.rmtree(bench.work, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--fault", nargs="*", help="as `FAULTS` of benchmarks/faults/kinds.py calls it")
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
