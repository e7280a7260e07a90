"""ExecuTorch's TextLLMRunner in a child process: the program and the tokenizer beside it, as apps open them."""

from __future__ import annotations

from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from targets.runners.child import ChildRunner
from targets.runners.messages import Load
from targets.runners.runner import Runner


def open_text_llm_runner(artifact: Artifact, runner: StandardRunner) -> Runner:
    """The artifact's program.

    Raises:
        TargetError: TextLLMRunner refuses it, or dies of it; with its words.
    """
    load = Load(str(artifact.path("model").resolve()))
    return ChildRunner("targets.runners.text_llm_runner.worker", load, runner)
