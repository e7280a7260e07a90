"""Counts the instructions that an arm64 CPU executes for a token, under qemu: free of noise."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bluelm.errors import UnavailableError
from bluelm.system.children import name_of, run
from export.artifacts.artifact import Artifact
from targets.emulator.feeds import graph_path, prompt_tokens, record
from targets.emulator.userland import PYTHON, userland, wheels

QEMU = "qemu-aarch64"
CPU = "cortex-a76"  # dot products in int8, as every phone since 2019 has
PLUGIN = Path(__file__).parents[1] / "data" / "count_instructions.c"
GUEST = Path(__file__).parents[1] / "data" / "qemu_guest.py"
GRAPHS = ("prefill", "decode")
TIME_LIMIT_S = 3600


@dataclass(frozen=True)
class Counts:
    """Instructions a token, what counted them, and how far the emulated logits are from this machine's.

    Attributes:
        prefill, decode: instructions a token. depth: tokens in the cache at the decode step.
        tools: qemu, onnxruntime, the CPU emulated: counts of other tools do not compare.
        relative_error: largest relative L2 error of the emulated logits of both graphs against the host's.
    """

    prefill: float
    decode: float
    depth: int
    tools: str
    relative_error: float


def qemu_version() -> tuple[int, ...]:
    """Of the dynamic qemu-aarch64, the one that takes plugins.

    Raises:
        UnavailableError: it is not installed.
    """
    if shutil.which(QEMU) is None:
        fix = "apt-get install qemu-user (not qemu-user-static: that takes no plugins)"
        raise UnavailableError(f"{QEMU} is not installed", fix=fix)
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        raise UnavailableError(f"{QEMU} reports no version: {said[:100]!r}")
    return tuple(int(part) for part in found.groups())


def build_plugin(folder: Path) -> Path:
    """Compile the plugin for the qemu that is here.

    Raises:
        UnavailableError: no qemu or no C compiler.
    """
    api = 1 if qemu_version()[0] < 9 else 2
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        raise UnavailableError("there is no C compiler to build qemu's plugin", fix="apt-get install gcc")
    built = folder / "count_instructions.so"
    command = [compiler, "-O2", "-shared", "-fPIC", f"-DAPI_VERSION={api}", "-o", str(built), str(PLUGIN)]
    done = run(command, Path(compiler).name)
    if done.returncode != 0:
        raise UnavailableError(f"qemu's plugin does not build: {done.stderr[-500:]}", where=PLUGIN)
    return built


def run_counted(command: Sequence[str], folder: Path, *, prefix: Path | None = None) -> dict[int, int]:
    """Run an arm64 program under qemu with the plugin.

    Args:
        command: the program and its arguments. prefix: root of the userland that it finds its files in.

    Returns:
        instructions so far at each mark; 0: at the end.

    Raises:
        UnavailableError: no qemu, no compiler, or the program failed.
    """
    out = folder / "marks.txt"
    plugin = build_plugin(folder)
    root = ["-L", str(prefix)] if prefix else []
    qemu = [QEMU, "-cpu", CPU, *root, "-plugin", f"file={plugin},out={out}"]
    # a fixed environment: its size moves the stack, and with it a few instructions
    environment = {"PATH": "/usr/bin", "HOME": "/", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}
    try:
        done = run(
            [*_same_addresses(), *qemu, *command],
            "the program under qemu",
            environment={**environment, "OPENBLAS_NUM_THREADS": "1"},
            limit_s=TIME_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"the program ran longer than {TIME_LIMIT_S} s under qemu") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise UnavailableError(f"the program failed under qemu ({name_of(done.returncode)}): {said}", fix="see its log")
    marks = {int(k): int(v) for k, v in re.findall(r"^mark (\d+) (\d+)$", out.read_text(), re.MULTILINE)}
    end = re.search(r"^end (\d+)$", out.read_text(), re.MULTILINE)
    return {**marks, 0: int(end[1])} if end else marks


def _same_addresses() -> list[str]:
    """Turns off the random layout of memory where that is allowed: counts then repeat to the instruction."""
    tried = shutil.which("setarch") and subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False)
    return ["setarch", "-R"] if tried and tried.returncode == 0 else []


def count(artifact: Artifact, depth: int = 0) -> Counts:
    """Count one chunk of prefill and one decode step of an artifact, each behind a warm-up run.

    Raises:
        UnavailableError: no qemu, no userland, or the emulated logits are not this machine's.
    """
    root = userland(wheels())
    feeds, logits = record(artifact, depth)
    with tempfile.TemporaryDirectory(prefix="bluelm-export-qemu-") as name:
        folder = Path(name)
        for graph in GRAPHS:
            np.savez(folder / f"{graph}.npz", **feeds[graph])  # pyright: ignore[reportArgumentType]
            (folder / f"{graph}.txt").write_text(str(graph_path(artifact, graph).resolve()), encoding="utf-8")
        python = str(root / f"usr/bin/python{PYTHON}")
        marks = run_counted([python, str(GUEST), str(folder), *GRAPHS], folder, prefix=root)
        error = max(_error(np.load(folder / f"{graph}.logits.npy"), logits[graph]) for graph in GRAPHS)
    if error > 0.05:
        raise UnavailableError(f"the emulated logits differ from this machine's by {error:.1%}: no count")
    tools = ", ".join((f"qemu {'.'.join(map(str, qemu_version()))} -cpu {CPU}", wheels()[0], _plugin_digest()))
    prefill, decode, prompt = marks[2] - marks[1], marks[4] - marks[3], prompt_tokens(artifact)
    return Counts(prefill / prompt, decode, depth or prompt, tools, error)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error; 1 where the shapes differ."""
    if found.shape != expected.shape:
        return 1.0
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _plugin_digest() -> str:
    content = PLUGIN.read_bytes() + GUEST.read_bytes()
    return f"counter {hashlib.sha256(content).hexdigest()[:8]}"
