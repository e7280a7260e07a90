"""onnxruntime-genai in a child process: the folder as apps open it."""

from __future__ import annotations

from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from targets.runners.child import ChildRunner
from targets.runners.messages import Load
from targets.runners.runner import Runner


def open_genai(artifact: Artifact, runner: StandardRunner) -> Runner:
    """The artifact's folder.

    Raises:
        TargetError: onnxruntime-genai refuses it, or dies of it; with its words.
    """
    load = Load(str(artifact.folder.resolve()))
    return ChildRunner("targets.runners.genai_worker", load, runner)
