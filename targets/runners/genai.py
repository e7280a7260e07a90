"""onnxruntime-genai in a child process: the folder as apps open it.

The record of onnx-genai does not name it yet: the gate would have to know that it puts nothing in front of a text, cuts
runs of over `export.onnx.genai_tokenizer.LONGEST` characters, and cannot leave a last answer open.
"""

from __future__ import annotations

from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from targets.runners.child import ChildRunner
from targets.runners.messages import Load
from targets.runners.runner import Runner, version_of


def open_genai(artifact: Artifact, runner: StandardRunner) -> Runner:
    """The artifact's folder.

    Raises:
        TargetError: onnxruntime-genai refuses it, or dies of it; with its words.
    """
    load = Load(str(artifact.folder.resolve()))
    return ChildRunner("targets.runners.genai_worker", load, f"{runner.name} {version_of(runner)}")
