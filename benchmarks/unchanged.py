"""Two trees of this project on the same demo: the same bytes of every artifact, the same figures of every runtime.

    python -m benchmarks.unchanged BEFORE OUT [--after TREE] [--only NAME ...]

BEFORE is a checkout of an earlier commit (`git worktree add`), the other side this one or TREE. Each side is run from
the command line in a process of its own: `quantize` by every method on the demo's first blocks, then a whole run of the
demo on every runtime that can be made here. Then all files are compared by SHA-256, and all figures of report.json.
OUT keeps what was made, so that a run that was broken off goes on. Ends with 1 where anything differs.

Left out: names of times, speed and memory in reports; the bytes that Qualcomm's compiler writes (its artifacts are
compared by their figures); records of the tool's own sources and folders.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bluelm.system.files import sha256

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
COMPILED = ("qnn-context", "executorch-qnn")
TIMED = re.compile(
    r"speed|tokens_per_s|seconds|_s\b|memory|peak|date|time|started|version|tool|log|path|folder|name|host|load"
)
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


def bytes_of(side: Path) -> dict[str, str]:
    """SHA-256 of every file of codes and artifacts, by its path."""
    found = {}
    for path in sorted((side / "quantized").rglob("*")) + sorted((side / "runs").rglob("*")):
        place = path.relative_to(side)
        compiled = place.parts[0] == "runs" and place.parts[1] in COMPILED and path.suffix in (".bin", ".pte", ".json")
        if path.is_file() and not compiled and not any(part in RECORDS for part in place.parts):
            found[str(place)] = sha256(path)
    return found


def figures_of(side: Path) -> dict[str, Any]:
    """Every value of every report, by the report and its place in it."""
    found: dict[str, Any] = {}
    for report in sorted((side / "runs").glob("*/report.json")):
        for place, value in _leaves(json.loads(report.read_text(encoding="utf-8"))):
            if not TIMED.search(place):
                found[f"{report.parent.name}: {place}"] = value
    return found


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in inner:
            yield from _leaves(one, f"{place}/{key}")
    else:
        yield place, value


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each value that is not the same on both sides."""
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--after", type=Path, default=ROOT)
    parser.add_argument("--only", nargs="*", default=[], choices=[*METHODS, *RUNTIMES])
    given = parser.parse_args()
    sides = {"before": given.before.resolve(), "after": given.after.resolve()}
    codes, files, figures = [], [], []
    for name, tree in sides.items():
        side = given.out.resolve() / name
        codes.append(make(tree, side, given.only))
        files.append(bytes_of(side))
        figures.append(figures_of(side))
    found = [*differences(*codes), *differences(*files), *differences(*figures)]
    print(f"{len(files[0])} files and {len(figures[0])} figures of {len(codes[0])} commands: {len(found)} differ")
    print("\n".join(found[:50]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
