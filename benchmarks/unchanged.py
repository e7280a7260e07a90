"""Two trees of this project on the same demo: the same bytes of every artifact, the same figures of every runtime.

    python -m benchmarks.unchanged BEFORE OUT [--after TREE] [--only NAME ...]

BEFORE is a checkout of an earlier commit (`git worktree add`), the other side this one or TREE. Each side is run from
the command line in a process of its own: `quantize` by every method on the demo, then a whole run of the demo on every
runtime that can be made here. Then all files are compared byte for byte, and all values of report.json.
OUT keeps what was made, so that a run that was broken off goes on. Ends with 1 where anything differs.

Left out: SHA-256 digests that stand in files as text (that of our own sources is in every checkpoint and what is made
of it; the files that others tell of are compared themselves); values of times, speed and memory in reports; the bytes
that compilers of others write, which differ from run to run (Qualcomm's, ExecuTorch's delegate for Core ML with its
random identifiers): those artifacts are compared by their figures, of which sizes to two digits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import pages

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path("bluelm") / "demo"
METHODS = {
    "rtn": ["--method", "rtn"],
    "gptq": ["--samples", "16"],
    "awq": ["--method", "awq", "--samples", "16"],
    "awq+gptq": ["--method", "awq+gptq", "--samples", "16", "--group-size", "128"],
    "rotated": ["--rotate", "--samples", "16", "--asymmetric"],
}
RUNTIMES = {
    "onnx-cpu": "generic-arm64",
    "onnx-genai": "generic-arm64",
    "litert": "generic-arm64",
    "gguf": "generic-arm64",
    "executorch-xnnpack": "dimensity",
    "coreml": "apple",
    "executorch-coreml": "apple",
    "qnn-context": "snapdragon",
    "executorch-qnn": "snapdragon",
}
"""A target for each; a new runtime is a row."""
DIGEST = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
COMPILED = ("qnn-context", "executorch-qnn", "executorch-coreml")
WRITTEN = (".bin", ".pte", ".json", ".onnx", ".log")  # by their compilers, and what names or wraps that
SIZES = ("artifact_bytes", "memory_bytes", "bits_per_weight", "part_bytes", "max_artifact_bytes", "max_memory_bytes")
MACHINE = ("host", "run")  # subjects of figures that its clocks and its memory decide
RECORDS = ("report.json", "log.txt", "report.html", "junit.xml", "summary.md", ".stages", "run.json", "previous")


def commands(side: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of everything that is run on a side."""
    for name, options in METHODS.items():
        out = side / "quantized" / name.replace("+", "-")
        yield name, ["quantize", str(DEMO), str(out), *options]
    for runtime, target in RUNTIMES.items():
        yield runtime, [
            *("--target", target, "--runtime", runtime, "--out", str(side / "runs"), "--name", runtime),
            *("--method", "rtn", "--eval-tokens", "1024", "--no-bundle"),
        ]  # fmt: skip


def make(tree: Path, side: Path, only: list[str]) -> dict[str, int]:
    """Exit codes by name; what was run before is not run again."""
    side.mkdir(parents=True, exist_ok=True)
    record = side / "codes.json"
    codes: dict[str, int] = json.loads(record.read_text()) if record.is_file() else {}
    environment = {**os.environ, "PYTHONPATH": str(tree), "BLUELM_EXPORT_HISTORY": str(side / "history.sqlite")}
    for name, arguments in commands(side):
        if name in codes or (only and name not in only):
            continue
        print(f"{tree.name}: {name}", flush=True)
        with (side / "said.txt").open("a", encoding="utf-8") as said:
            done = subprocess.run(
                [sys.executable, "-m", "pipeline", *arguments], cwd=tree, env=environment, stdout=said, stderr=said
            )
        codes[name] = done.returncode
        record.write_text(json.dumps(codes), encoding="utf-8")
    return codes


def content(path: Path) -> str:
    """SHA-256 of a file's bytes with zeros in place of the digests in it."""
    return hashlib.sha256(DIGEST.sub(b"0" * 64, path.read_bytes())).hexdigest()


def bytes_of(side: Path, names: set[str]) -> dict[str, str]:
    """The content of every file of codes and artifacts, by its path."""
    found = {}
    for path in sorted((side / "quantized").rglob("*")) + sorted((side / "runs").rglob("*")):
        place = path.relative_to(side)
        compiled = place.parts[0] == "runs" and place.parts[1] in COMPILED and path.suffix in WRITTEN
        known = place.parts[1] in {name.replace("+", "-") for name in names}
        if known and path.is_file() and not compiled and not any(part in RECORDS for part in place.parts):
            found[str(place)] = content(path)
    return found


def figures_of(side: Path, names: set[str]) -> dict[str, Any]:
    """Every figure and every check of every report that no clock, load or memory of this machine decides."""
    found: dict[str, Any] = {}
    for name in (name for name in RUNTIMES if name in names):
        report = json.loads((side / "runs" / name / "report.json").read_text(encoding="utf-8"))
        for kind in ("measurements", "checks"):
            for one in report[kind]:
                if one["subject"] not in MACHINE:
                    size = name in COMPILED and one["name"].startswith(SIZES)
                    found[f"{name}: {kind}, {one['name']} ({one['subject']})"] = f"{one['value']:.1e}" if size else one
        found |= {f"{name}: {key}": report[key] for key in ("documents", "budget", "warnings", "passed")}
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each value that is not the same on both sides."""
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def commit_of(tree: Path) -> str:
    """Of a checkout."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--after", type=Path, default=ROOT)
    parser.add_argument("--only", nargs="*", default=[], choices=[*METHODS, *RUNTIMES])
    given = parser.parse_args()
    sides = {"before": given.before.resolve(), "after": given.after.resolve()}
    places = [given.out.resolve() / name for name in sides]
    codes = [make(tree, place, given.only) for tree, place in zip(sides.values(), places, strict=True)]
    codes = [{name: code for name, code in each.items() if all(name in other for other in codes)} for each in codes]
    files, figures = ([found(place, set(codes[0])) for place in places] for found in (bytes_of, figures_of))
    found = [*differences(*codes), *differences(*files), *differences(*figures)]
    print(f"{len(files[0])} files and {len(figures[0])} figures of {len(codes[0])} commands: {len(found)} differ")
    print("\n".join(found[:50]))
    commits = [commit_of(tree) for tree in sides.values()]
    part = {"commands": sorted(codes[0]), "files": len(files[0]), "figures": len(figures[0]), "differ": found[:50]}
    pages.save("unchanged", {"demo": {**part, "before": commits[0], "after": commits[1], "made": pages.stamp()}})
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
