"""mlx-lm in a child process: the folder as its users open it."""

from __future__ import annotations

from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from export.mlx import FOLDER
from targets.runners.child import ChildRunner
from targets.runners.messages import Load
from targets.runners.runner import Runner


def open_mlx_lm(artifact: Artifact, runner: StandardRunner) -> Runner:
    """The artifact's folder `model`.

    Raises:
        TargetError: mlx-lm refuses it, or dies of it; with its words.
    """
    load = Load(str((artifact.folder / FOLDER).resolve()))
    return ChildRunner("targets.runners.mlx_worker", load, runner)
