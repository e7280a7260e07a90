"""llama.cpp, of the package xllamacpp: its server in a child process."""

from __future__ import annotations

import os

from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from targets.runners.child import ChildRunner
from targets.runners.messages import Load
from targets.runners.runner import Runner

THREADS = 2
DRAWN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def open_llama_cpp(artifact: Artifact, runner: StandardRunner) -> Runner:
    """The artifact's file.

    Raises:
        TargetError: llama.cpp refuses it, or dies of it; with its words.
    """
    load = Load(str(artifact.path("model").resolve()), _threads())
    return ChildRunner("targets.runners.llama_cpp_worker", load, runner, drawn=DRAWN, words=_refusal)


def _refusal(tail: str) -> str:
    """Of the first line that its log marks as an error."""
    told = next((line.partition(" E ")[2] for line in tail.splitlines() if " E " in line), "").strip()
    return f"llama.cpp refuses the file: {told}" if told else ""


def _threads() -> int:
    """As many as the other runtimes here are given; its threads wait for one another at full speed."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) > 0 else THREADS
