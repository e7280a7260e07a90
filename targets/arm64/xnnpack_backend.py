"""ExecuTorch on a phone's CPU: one .pte on XNNPACK for every arm64 chip, nothing to compile."""

from __future__ import annotations

from pathlib import Path

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from targets.backend import LoweringJob, Uncompiled
from targets.legality import check_integer_kernels
from targets.socs import Soc


class XnnpackBackend(Uncompiled):
    """Symmetric weights: 4 bits in groups of a multiple of 32, or one scale a row."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        check_integer_kernels("XNNPACK", recipe)
        if recipe.embed_bits != 8:
            raise TargetError("ExecuTorch artifacts hold the embedding in 8 bits", fix="use --embed-bits 8")

    def check_tokenizer(self, folder: Path, config: ModelConfig) -> None:
        from export.tokenizer.llm_runner import check_tokenizer

        check_tokenizer(folder)

    def lower(self, job: LoweringJob) -> Artifact:
        from export.executorch import xnnpack as executorch

        return executorch.export(job.quantized, job.folder, **job.sized)
