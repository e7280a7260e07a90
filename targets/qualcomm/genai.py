"""Snapdragons through onnxruntime-genai: its `decoder-pipeline`, whose stages are the compiled graphs.

    onnx-npu-genai (openable as it is, on a CPU) -> Qualcomm's compiler -> contexts for the same stages

What answers here is genai itself, which registers Qualcomm's plug-in and runs the stages on the x86 simulator, compiled
one by one (`targets/qualcomm/compile.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from bluelm.config import ModelConfig
from bluelm.system.progress import Progress
from bluelm.text.tokenizer import Tokenizer
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from export.npu_genai.config import CONFIG, FRONT, padding, session
from export.npu_genai.export import check_window, export
from export.npu_genai.provider import provider_options
from export.tokenizer.genai import check_tokenizer
from targets.backend import LoweringJob
from targets.host.child import next_core
from targets.qualcomm.backend import HtpBackend, chip_of, lowered
from targets.qualcomm.compile import Form, compile_contexts
from targets.runners.child import ChildRunner
from targets.runners.messages import Load
from targets.runners.runner import Runner
from targets.socs import Soc
from targets.tools import require

SIMULATED, PLUGIN = "simulator-", "onnxruntime-qnn"
BESIDE = ("front", "embedding", "tokenizer", "runner", "config", "genai")
"""Roles of what a stage or genai reads beside the compiled graphs."""


class PipelineBackend(HtpBackend):
    """As for qnn-context, within what genai asks of lengths, embedding and vocabulary."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        check_window(context, chunk)

    def check_tokenizer(self, folder: Path, config: ModelConfig) -> None:
        check_tokenizer(folder)
        padding(Tokenizer.from_folder(folder), config)

    def lower(self, job: LoweringJob) -> Artifact:
        return lowered(job, export)

    def compile(self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None) -> Artifact:
        return compile_contexts(artifact, chip_of(soc), target, soc.id, folder, progress, form=FORM)


def _told(artifact: Artifact, folder: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """genai_config.json once more, its stages behind the first on the NPU; its role."""
    told = json.loads(artifact.path("genai").read_text(encoding="utf-8"))
    provider = provider_options(int(settings["soc_model"]), int(settings["htp_arch"]))
    (stages,) = told["model"]["decoder"]["pipeline"]
    for stage in stages.values():
        if stage["filename"] != FRONT:
            stage["session_options"] = session(provider)
    (folder / CONFIG).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return {CONFIG: "genai"}


FORM = Form("qnn-genai", _told)


def open_simulated(artifact: Artifact, runner: StandardRunner) -> Runner:
    """The artifact's folder as it ships, but for the contexts, which are those that the simulator loads.

    Raises:
        UnavailableError: the plug-in is not installed.
        TargetError: onnxruntime-genai or the plug-in refuses it, or dies of it; with its words.
    """
    require(PLUGIN, "libatomic.so.1")
    with tempfile.TemporaryDirectory(prefix="bluelm-genai-") as scratch:
        for file in artifact.files:
            role = file.role.removeprefix(SIMULATED)
            simulated = file.role.startswith(SIMULATED) and role in ("prefill", "decode", "context")
            if simulated or file.role in BESIDE:
                place = file.path.removeprefix("simulator/") if simulated else file.path
                _link((artifact.folder / file.path).resolve(), Path(scratch) / place)
        opened = ChildRunner("targets.runners.genai_worker", Load(scratch), runner, core=next_core())
        opened.name += f" with {PLUGIN} {version(PLUGIN)}"
        return opened


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them; contexts are large."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
