"""LiteRT on a phone's CPU: one .tflite on XNNPACK for every arm64 chip, nothing to compile."""

from __future__ import annotations

from bluelm.config import ModelConfig
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from targets.arm64.backends import CpuBackend
from targets.backend import LoweringJob
from targets.legality import check_integer_kernels
from targets.socs import Soc


class LitertBackend(CpuBackend):
    """The kernels, and so the rules, of XNNPACK."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        check_integer_kernels("LiteRT", recipe)

    def lower(self, job: LoweringJob) -> Artifact:
        from export.litert import export as litert

        return litert.export(job.quantized, job.folder, ranges=job.ranges, **job.sized)
