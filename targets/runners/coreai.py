"""In place of Apple's `CoreAILanguageModel`: transformers on the tokenizer of its folder, Apple's CPU runtime on the
program, in a child process."""

from __future__ import annotations

from export.artifacts.artifact import Artifact
from export.coreai import FOLDER
from export.formats import StandardRunner
from targets.runners.child import ChildRunner
from targets.runners.messages import Load
from targets.runners.runner import Runner


def open_folder(artifact: Artifact, runner: StandardRunner) -> Runner:
    """The artifact's folder `model`.

    Raises:
        TargetError: one of the two refuses it, or dies of it; with its words.
    """
    load = Load(str((artifact.folder / FOLDER).resolve()))
    return ChildRunner("targets.runners.coreai_worker", load, runner)
