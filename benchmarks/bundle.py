"""How long packing and signing a large artifact takes beside copying it, and how much memory.

    python benchmarks/bundle.py [--gigabytes 3] [--folder /tmp/bundle-benchmark]

The artifact is random bytes: several files, one of them larger than one APK may be. Every step runs in a process
of its own, so that its peak memory is its own; `sync` belongs to every time. Copying and packing take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("import", "copy", "apk", "ipa", "folder", "verify")
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
    sys.path.insert(0, str(ROOT))
    from export.bundle import build
    from export.bundle.build import Input
    from export.bundle.zip32 import FileSource
    from tests import bundles

    signing = bundles.development_keys(out.parent)
    inputs = [Input(f"artifact/{p.name}", "file", FileSource(p)) for p in sorted(artifact.iterdir())]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if name == "copy":
        for path in sorted(artifact.iterdir()):
            out.mkdir(exist_ok=True)
            with path.open("rb") as source, (out / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, MIB)
    elif name == "verify":
        build.verify(next(out.parent.glob("out-apks")))
    elif name in ("apk", "ipa", "folder"):
        build.make(bundles.draft(name), inputs, signing, out)
    os.sync()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_mb": peak * 1024 / 1e6, "before_mb": before * 1024 / 1e6}))


def measure(name: str, artifact: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", name, "--artifact", str(artifact), "--out", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def clean(folder: Path) -> None:
    for path in folder.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bundle-benchmark"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--out", type=Path)
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
    copy = statistics.median(r["seconds"] for r in results["copy"])
    print("| step | median s | runs s | x copy | peak MB |\n|---|---|---|---|---|")
    for name, runs in results.items():
        seconds = [r["seconds"] for r in runs]
        median = statistics.median(seconds)
        each = ", ".join(f"{s:.1f}" for s in seconds)
        peak = max(r["peak_mb"] for r in runs)
        print(f"| {name} | {median:.1f} | {each} | {median / copy:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
