"""LiteRT-LM in a child process: the file as apps open it."""

from __future__ import annotations

import re

from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from targets.runners.child import ChildRunner
from targets.runners.messages import Load
from targets.runners.runner import Runner

ERROR = re.compile(r"^[EF]\d{4} .*?\] (?P<told>.+)$", re.MULTILINE)
"""A line of its log that tells of an error."""


def open_litert_lm(artifact: Artifact, runner: StandardRunner) -> Runner:
    """The artifact's file.

    Raises:
        TargetError: LiteRT-LM refuses it, or dies of it; with its words.
    """
    load = Load(str(artifact.path("model").resolve()))
    return ChildRunner("targets.runners.litert_lm.worker", load, runner, words=_refusal)


def _refusal(tail: str) -> str:
    """Of the first line of the log that tells of an error."""
    found = ERROR.search(tail)
    return f"LiteRT-LM refuses the file: {found['told']}" if found else ""
