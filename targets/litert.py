"""LiteRT on a phone's CPU: one .tflite on XNNPACK for every arm64 chip, nothing to compile."""

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
class LitertBackend:
    """The kernels, and so the rules, of XNNPACK."""

    kv_bits: KvBits = 32
    kv_widths = (32, 16, 8)
    place: Place = "cpu"

    @property
    def needs_ranges(self) -> bool:
        """An 8-bit cache has fixed scales."""
        return self.kv_bits == 8

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        check_lengths(config, context, chunk)
        check_groups(config, recipe)
        check_integer_kernels("LiteRT", recipe)

    def lower(
        self,
        quantized: QuantizedCheckpoint,
        ranges: Ranges | None,
        folder: Path,
        context: int,
        chunk: int,
        progress: Progress | None,
    ) -> Artifact:
        from export import litert

        return litert.export(
            quantized, folder, context=context, chunk=chunk, kv_bits=self.kv_bits, ranges=ranges, progress=progress
        )

    def compile(self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None) -> Artifact:
        return artifact
