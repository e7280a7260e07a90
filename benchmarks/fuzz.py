"""Fuzz all that reads foreign bytes (`tests/support/readers`), guided by coverage with atheris (libFuzzer).

    pip install atheris
    python -m benchmarks.fuzz [--inputs 100000] [--only NAME ...]

Each reader runs in a process of its own. A fault is: an exception that is no ExportError, one input that takes more
than 20 s, more than 500 MB of memory above what the reader's libraries and its valid input take, or a file opened for
writing outside the reader's folder. The input of a fault stays in --keep. Writes results/fuzz.json and the page;
readers that are not named keep their rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NoReturn

SECONDS_AN_INPUT = 20
MEMORY_MB = 500
INSTRUMENTED = ["bluelm", "compress", "export", "eval", "calibration"]
COLUMNS = ("reader", "inputs", "accepted", "slowest input, s", "memory above start, MB", "fault")


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
            self._check(Path(os.fsdecode(arguments[0])).resolve())
        elif event in ("os.rename", "os.symlink", "os.link"):  # takes the place of a link, not of what it leads to
            name = Path(os.fsdecode(str(arguments[1])))
            self._check(name.parent.resolve() / name.name)
        elif event in ("os.mkdir", "os.truncate"):
            self._check(Path(os.fsdecode(str(arguments[0]))).resolve())

    @staticmethod
    def _writes(arguments: tuple[object, ...]) -> bool:
        mode, flags = arguments[1], arguments[2]
        written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(written) or (isinstance(mode, str) and any(letter in mode for letter in "wax+"))

    def _check(self, path: Path) -> None:
        if not path.is_relative_to(self.folder) and path != Path("/dev/null"):
            self.found.append(str(path))


@cache
def instrumented() -> tuple[ModuleType, ModuleType]:
    """atheris, and `tests.support.readers` with all that it imports instrumented."""
    atheris = importlib.import_module("atheris")  # not among the test extras: `pip install atheris`
    with atheris.instrument_imports(include=INSTRUMENTED):
        readers = importlib.import_module("tests.support.readers")
    return atheris, readers


def one_reader(name: str, inputs: int, folder: Path, keep: Path) -> None:
    """Fuzz one reader in this process; writes what it saw to `folder`/result.json as it goes."""
    atheris, readers = instrumented()
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
    """What libFuzzer made, or half of the time the valid input with a few of its bytes changed: behind checksums and
    lengths, whole mutations rarely come far."""
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
    """One reader in a child process, forked: importing instrumented code takes longer than most readers' inputs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        words = Path(place) / "words"
        child = os.fork()
        if child == 0:
            _in_child(name, inputs, Path(place), keep, words)
        _, status = os.waitpid(child, 0)
        result = Path(place) / "result.json"
        found: dict[str, object] = json.loads(result.read_text()) if result.is_file() else {"inputs": 0}
        said = words.read_text(errors="replace") if words.is_file() else ""
        return found | {"reader": name, "fault": None if status == 0 else f"status {status}\n{said[-3000:]}"}


def _in_child(name: str, inputs: int, place: Path, keep: Path, words: Path) -> NoReturn:
    """Fuzz; what is written goes to `words`; leaves with libFuzzer's exit code, or 70 after an exception of ours."""
    descriptor = os.open(words, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        one_reader(name, inputs, place, keep)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:  # noqa: BLE001 - the parent tells it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--keep", type=Path, default=Path("/tmp/fuzz-faults"))
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    names: Sequence[str] = given.only or list(instrumented()[1].READERS)
    instrumented()  # before the first fork
    share = -(-given.inputs // len(names))
    rows: list[list[str]] = []
    for name in names:
        found = fuzz(name, share, given.keep)
        counts = [str(found["inputs"]), str(found.get("accepted", 0)), f"{found.get('slowest_s', 0):.2f}"]
        fault = "none" if found["fault"] is None else "**yes**"
        rows.append([name, *counts, f"{found.get('memory_mb', 0):.0f}", fault])
        print(rows[-1], flush=True)
        if found["fault"]:
            print(f"{found['fault']}\n", file=sys.stderr, flush=True)
    from benchmarks import pages  # not before the readers are instrumented: it imports some of what they do

    pages.save_rows("fuzz", "readers", COLUMNS, rows, names=instrumented()[1].READERS)
    print(f"{sum(int(row[1]) for row in rows)} inputs")
    sys.exit(any(row[-1] != "none" for row in rows))


if __name__ == "__main__":
    main()
