"""Core AI programs: made by our exporter, run by Apple's own CPU runtime in a child process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bluelm.block import STREAM, Norm, block_of
from bluelm.config import ModelConfig
from bluelm.errors import ExportError, TargetError
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.coreai import ASSET, FOLDER
from export.coreai.static.contract import check_lengths
from targets.apple.coreai_messages import Open, Step, Stepped
from targets.backend import LoweringJob, Uncompiled
from targets.host.child import Child
from targets.runtime import RuntimeBase
from targets.socs import Soc
from targets.tools import require

LOAD_S, STEP_S = 1800.0, 3600.0
CHUNK = 128
"""Tokens of a prompt that are given at once here."""


class CoreaiBackend(Uncompiled):
    """Symmetric weights with scales in float16."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        if not recipe.symmetric:
            raise TargetError("the program has no zero points for weights", fix="use a symmetric recipe")

    def lower(self, job: LoweringJob) -> Artifact:
        from export.coreai.export import export

        return export(job.quantized, job.folder, context=job.context, about=job.about, progress=job.progress)


class CoreaiAneBackend(CoreaiBackend):
    """Lengths that Apple's engine for the Neural Engine takes, too."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        check_lengths(config, context, chunk)

    def lower(self, job: LoweringJob) -> Artifact:
        from export.coreai.export import export_static

        return export_static(
            job.quantized, job.folder, context=job.context, chunk=job.chunk, about=job.about, progress=job.progress
        )


class CoreaiRuntime(RuntimeBase):
    """The artifact's program in Apple's runtime: `main`, or the functions that Apple's engine would call.

    Raises:
        TargetError: Core AI refuses the program, or its process dies of it.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.name, self.context = "Core AI on cpu", artifact.context
        self.vocab_size = artifact.model.vocab_size
        self._held, self.chunk = 0, CHUNK
        self._scratch = tempfile.TemporaryDirectory(prefix="bluelm-coreai-")
        self._child = Child("targets.apple.coreai_worker", Path(self._scratch.name) / "log.txt")
        path = artifact.folder / FOLDER / ASSET
        try:
            self._child.call(Open(str(path.resolve()), "main", self.context, _norms(artifact.model)), LOAD_S)
        except ExportError:
            self.close()
            raise

    def reset(self) -> None:
        self._held = 0

    def rewind(self, held: int) -> None:
        self._held = held

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        return np.concatenate([one.logits for one in self._steps(tokens, shown=False)])

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin anew; the stream before the first block and behind each, float32 [layers + 1, n, hidden]."""
        self.reset()
        streams = [one.stream for one in self._steps(tokens, shown=True)]
        return np.concatenate([stream for stream in streams if stream is not None], axis=1)

    def _steps(self, tokens: Sequence[int], shown: bool) -> list[Stepped]:
        """What comes of each chunk."""
        self.check_tokens(tokens, self._held)
        made: list[Stepped] = []
        for start in range(0, len(tokens), CHUNK):
            part = [int(token) for token in tokens[start : start + CHUNK]]
            made.append(self._child.call(Step(part, self._held, shown=shown), STEP_S))
            self._held += len(part)
        return made

    def close(self) -> None:
        self._child.close()
        self._scratch.cleanup()


def _norms(config: ModelConfig) -> int:
    """How many norms of the stream a block has; the first reads what comes in."""
    norms = [step for step in block_of(config).steps if isinstance(step, Norm) and step.size == config.hidden_size]
    assert norms[0].reads == STREAM
    return len(norms)


def open_coreai(artifact: Artifact) -> CoreaiRuntime:
    """The artifact in Apple's runtime.

    Raises:
        UnavailableError: coreai-core is not installed.
        TargetError: it refuses the program.
    """
    require("coreai-core")
    return CoreaiRuntime(artifact)
