"""Fuzz everything that reads foreign bytes (`tests/readers.py`), guided by coverage with atheris (libFuzzer).

    pip install atheris
    python benchmarks/fuzz.py [--inputs 100000] [--only NAME ...] [--jobs 1]

Each reader runs in a process of its own. A fault is: an exception that is no ExportError, one input that
takes more than 20 s, more than 500 MB of memory above what the reader's libraries and its valid input take,
or a file opened for writing outside the reader's folder. The input of a fault stays in --keep.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SECONDS_AN_INPUT = 20
MEMORY_MB = 500
INSTRUMENTED = ["bluelm", "compress", "export", "eval", "calibration"]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class Watch:
    """Files opened for writing outside a folder, told by the interpreter's audit hook."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.armed = folder.resolve(), list[str](), False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.armed:
            return
        if event == "open" and isinstance(arguments[0], str | bytes) and self._writes(arguments):
            self._check(os.fsdecode(arguments[0]))
        elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.truncate"):
            self._check(os.fsdecode(str(arguments[1 if event in ("os.rename", "os.symlink", "os.link") else 0])))

    @staticmethod
    def _writes(arguments: tuple[object, ...]) -> bool:
        mode, flags = arguments[1], arguments[2]
        written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(written) or (isinstance(mode, str) and any(letter in mode for letter in "wax+"))

    def _check(self, name: str) -> None:
        path = Path(name).resolve()
        if not path.is_relative_to(self.folder) and name != "/dev/null":
            self.found.append(str(path))


def one_reader(name: str, inputs: int, folder: Path, keep: Path) -> None:
    """Fuzz one reader in this process; writes what it saw to `folder`/result.json as it goes."""
    atheris = importlib.import_module("atheris")  # not among the test extras: `pip install atheris`
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests import readers
    reader = readers.READERS[name]()
    home = readers.fresh(reader, folder / "home")
    tempfile.tempdir = str(folder)
    watch = Watch(folder)
    for _ in range(3):
        assert readers.allowed(reader, home, reader.seed), f"{name}: the valid input is refused"
    before = peak_mb()
    seen = {"inputs": 0, "accepted": 0, "slowest_s": 0.0, "memory_mb": 0.0}
    generator = random.Random(name)
    last = [time.monotonic()]

    def report() -> None:
        (folder / "result.json").write_text(json.dumps(seen))

    def one(data: bytes) -> None:
        if seen["inputs"] % 64 == 0:
            readers.fresh(reader, home)
        started = time.perf_counter()
        watch.armed = True
        try:
            seen["accepted"] += readers.allowed(reader, home, _mixed(data, reader.seed, generator))
        finally:
            watch.armed = False
        seen["inputs"] += 1
        seen["slowest_s"] = max(seen["slowest_s"], time.perf_counter() - started)
        seen["memory_mb"] = max(seen["memory_mb"], peak_mb() - before)
        if watch.found:
            raise AssertionError(f"wrote outside its folder: {watch.found[:3]}")
        if time.monotonic() - last[0] > 1 or seen["inputs"] >= inputs:
            last[0] = time.monotonic()
            report()

    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(reader.seed)
    options = [
        f"-runs={inputs}",
        f"-timeout={SECONDS_AN_INPUT}",
        f"-artifact_prefix={keep}/{name.replace(' ', '-')}-",
    ]
    options += [
        "-seed=1",
        f"-max_len={2 * len(reader.seed) + 64}",
        f"-rss_limit_mb={int(before) + MEMORY_MB}",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def _mixed(data: bytes, seed: bytes, generator: random.Random) -> bytes:
    """What libFuzzer made, or half of the time the valid input with a few of its bytes changed: behind
    checksums
    and lengths, whole mutations rarely come far."""
    if generator.random() < 0.5:
        return data
    changed = bytearray(seed)
    for _ in range(generator.choice((1, 1, 2, 8))):
        place = generator.randrange(len(changed))
        match generator.randrange(4):
            case 0:
                changed[place] ^= 1 << generator.randrange(8)
            case 1:
                changed[place] = generator.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del changed[place : place + generator.choice((1, 4, 64))]
            case _:
                changed[place:place] = data[: generator.choice((1, 8, 64))]
        if not changed:
            return data
    return bytes(changed)


def fuzz(name: str, inputs: int, keep: Path) -> dict[str, object]:
    """One reader in a child process."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        command = [sys.executable, __file__, "--reader", name, "--inputs", str(inputs)]
        command += ["--place", place, "--keep", str(keep)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        result = Path(place) / "result.json"
        found: dict[str, object] = json.loads(result.read_text()) if result.is_file() else {"inputs": 0}
        found |= {"reader": name, "fault": None if done.returncode == 0 else done.stderr[-3000:]}
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("/tmp/fuzz-faults"))
    parser.add_argument("--reader")
    parser.add_argument("--place", type=Path)
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    if given.reader:
        one_reader(given.reader, given.inputs, given.place, given.keep)
        return
    from tests.readers import READERS

    names: Sequence[str] = given.only or list(READERS)
    share = -(-given.inputs // len(names))
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = []
        print(
            "| reader | inputs | accepted | slowest input s | memory above start MB | fault |"
            "\n|---|---|---|---|---|---|"
        )
        for row in pool.map(lambda name: fuzz(name, share, given.keep), names):
            rows.append(row)
            fault = "none" if row["fault"] is None else "**yes**"
            counts = f"{row['inputs']} | {row.get('accepted', 0)} | {row.get('slowest_s', 0):.2f}"
            figures = f"{counts} | {row.get('memory_mb', 0):.0f}"
            print(f"| {row['reader']} | {figures} | {fault} |", flush=True)
    print(f"\n{sum(int(str(row['inputs'])) for row in rows)} inputs")
    for row in rows:
        if row["fault"]:
            print(f"\n## {row['reader']}\n{row['fault']}")
    sys.exit(any(row["fault"] for row in rows))


if __name__ == "__main__":
    main()
