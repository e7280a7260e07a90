"""Any arm64 phone's CPU: onnx-cpu artifacts, run by onnxruntime as they are."""

from __future__ import annotations

from pathlib import Path

from bluelm.config import ModelConfig
from bluelm.progress import Progress
from compress.recipe import Recipe
from compress.store import QuantizedCheckpoint
from export import onnx_cpu
from export.artifact import Artifact
from export.ranges import Ranges
from targets.legality import check_groups, check_lengths
from targets.runtime import Place
from targets.socs import Soc


class CpuBackend:
    """Every width, group size and symmetry runs; nothing is compiled."""

    needs_ranges = False
    place: Place = "cpu"

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        check_lengths(config, context, chunk)
        check_groups(config, recipe)

    def lower(
        self,
        quantized: QuantizedCheckpoint,
        ranges: Ranges | None,
        folder: Path,
        context: int,
        chunk: int,
        progress: Progress | None,
    ) -> Artifact:
        return onnx_cpu.export(quantized, folder, context=context, chunk=chunk, progress=progress)

    def compile(
        self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None
    ) -> Artifact:
        return artifact
