"""How long packing and signing a large artifact takes beside copying it, and how much memory.

    python -m benchmarks.bundles.bundle [--gigabytes 3] [--repeats 3] [--folder /tmp/bundle-benchmark]

The artifact is random bytes: several files, one of them (of 3 GB) larger than one APK may be. Every step runs in a
process of its own, so that its peak memory is its own; `sync` belongs to every time. Copying and packing take turns.
Writes results/bundles/bundle.json and the page; other sizes keep their rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import pages
from bluelm.system.memory import peak

STEPS = {
    "import": "import of the code alone",
    "copy": "copy (1 MiB pieces)",
    "apk": "apk: split APKs, v2 and v3, manifest, ML-BOM, model signature",
    "ipa": "ipa: sealed, ad hoc signature, manifest, ML-BOM, model signature",
    "folder": "folder: manifest, ML-BOM, model signature",
    "verify": "verify of the APKs, every byte",
}
COLUMNS = ("GB", "step", "median s", "runs, s", "x copy", "peak MB")
MIB = 1 << 20


def fill(path: Path, size: int) -> None:
    """Random bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(os.urandom(min(MIB, size - start)))


def make_artifact(folder: Path, total: int) -> None:
    """Shares of `total`: one file of three quarters, a smaller one, small ones."""
    fill(folder / "weights.bin", total * 3 // 4)
    fill(folder / "embedding.safetensors", total // 4 - MIB)
    for index in range(16):
        fill(folder / f"part{index}.bin", MIB // 16)


def step(name: str, artifact: Path, out: Path) -> None:
    """One step in this process; prints seconds and peak memory."""
    from export.bundle import build
    from export.bundle.build import Input
    from export.bundle.zip32 import FileSource
    from tests.support import bundles

    signing = bundles.development_keys(out.parent)
    inputs = [Input(f"artifact/{p.name}", "file", FileSource(p)) for p in sorted(artifact.iterdir())]
    before = peak()
    started = time.perf_counter()
    if name == "copy":
        for path in sorted(artifact.iterdir()):
            out.mkdir(exist_ok=True)
            with path.open("rb") as source, (out / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, MIB)
    elif name == "verify":
        build.verify(next(out.parent.glob("out*apk*")))  # one APK, or a folder of splits
    elif name in ("apk", "ipa", "folder"):
        build.make(bundles.draft(name), inputs, signing, out)
    os.sync()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mb": peak() / 1e6, "before_mb": before / 1e6}))


def measure(name: str, artifact: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.bundles.bundle", "--step", name]
    command += ["--artifact", str(artifact), "--out", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def clean(folder: Path) -> None:
    for path in folder.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bundle-benchmark"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--artifact", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        step(given.step, given.artifact, given.out)
        return
    artifact = given.folder / "artifact"
    shutil.rmtree(given.folder, ignore_errors=True)
    make_artifact(artifact, int(given.gigabytes * 1e9))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
    for _ in range(given.repeats):
        for name in STEPS:
            if name != "verify":
                clean(given.folder)
            if name == "verify":
                clean(given.folder)
                measure("apk", artifact, given.folder / "out")
            results[name].append(measure(name, artifact, given.folder / "out"))
    shutil.rmtree(given.folder)
    copy = statistics.median(run["seconds"] for run in results["copy"])
    rows = [[f"{given.gigabytes:g}", STEPS[name], *row(runs, copy)] for name, runs in results.items()]
    pages.save_rows("bundle", "steps", COLUMNS, rows, key=2)


def row(runs: list[dict[str, float]], copy: float) -> list[str]:
    """Seconds of a step, beside those of a copy; its largest peak."""
    seconds = [run["seconds"] for run in runs]
    median, each = statistics.median(seconds), ", ".join(f"{s:.1f}" for s in seconds)
    return [f"{median:.1f}", each, f"{median / copy:.2f}", f"{max(run['peak_mb'] for run in runs):.0f}"]


if __name__ == "__main__":
    main()
