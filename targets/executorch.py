"""ExecuTorch on a phone's CPU: one .pte on XNNPACK for every arm64 chip, nothing to compile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bluelm.config import ModelConfig
from bluelm.progress import Progress
from compress.recipe import Recipe
from compress.store import QuantizedCheckpoint
from export.artifact import Artifact
from export.mobile_package import KvBits
from export.ranges import Ranges
from targets.legality import check_groups, check_integer_kernels, check_lengths
from targets.runtime import Place
from targets.socs import Soc


@dataclass
class ExecutorchBackend:
    """Symmetric weights: 4 bits in groups of a multiple of 32, or one scale a row."""

    kv_bits: KvBits = 32
    kv_widths = (32, 16, 8)
    needs_ranges = False
    place: Place = "cpu"

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        check_lengths(config, context, chunk)
        check_groups(config, recipe)
        check_integer_kernels("XNNPACK", recipe)

    def lower(
        self,
        quantized: QuantizedCheckpoint,
        ranges: Ranges | None,
        folder: Path,
        context: int,
        chunk: int,
        progress: Progress | None,
    ) -> Artifact:
        from export import executorch

        return executorch.export(
            quantized, folder, context=context, chunk=chunk, kv_bits=self.kv_bits, progress=progress
        )

    def compile(self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None) -> Artifact:
        return artifact
