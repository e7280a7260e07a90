"""Quantized checkpoints without calibration, rounded to nearest: of the demo model, or of any small one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import TOKENIZER_FILES
from calibration.samples import CalibrationReport, Samples, load_samples
from compress.checkpoint.quantized import OrderedWeight
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from tests.support.checkpoints.shapes import LINEARS, shortened


def rounded(
    folder: Path, *, source: Path | None = None, blocks: int | None = None, **recipe: object
) -> QuantizedCheckpoint:
    """Write the first `blocks` blocks of a checkpoint (default: the demo model) as a quantized one."""
    made = Recipe.make({"method": "rtn", "samples": 1, "length": 8, **recipe})
    source = source or demo_checkpoint()
    if blocks is not None:
        source = shortened(source, blocks, folder.with_name(f"{folder.name}-float"))
    return quantize(Checkpoint.open(source), _samples(source), made, folder)


def _samples(source: Path) -> Samples:
    """8 tokens, which rounding does not look at."""
    if any((source / name).is_file() for name in TOKENIZER_FILES):
        return load_samples(None, Checkpoint.open(source).tokenizer(), 1, 8, 0)
    return Samples(torch.arange(8)[None], CalibrationReport("none", "", 0, 0, 1, 8, 8, 0, 0.0, 0.0, 0.0, 0.0, ()))


@dataclass(frozen=True)
class Damaged(QuantizedCheckpoint):
    """A quantized checkpoint one of whose blocks has its scales times 1.05."""

    block_hurt: int = 0

    @staticmethod
    def of(whole: QuantizedCheckpoint, block: int) -> Damaged:
        return Damaged(**{field.name: getattr(whole, field.name) for field in fields(whole)}, block_hurt=block)

    def block(self, index: int) -> dict[str, Tensor]:
        at = f"model.layers.{index}"
        hurt = {f"{name}.weight": self.linear(f"{at}.{name}").dequantize() for name in LINEARS}
        return {**super().block(index), **hurt}

    def ordered(self, name: str) -> OrderedWeight:
        found = super().ordered(name)
        if not name.startswith(f"model.layers.{self.block_hurt}."):
            return found
        scales = (found.weight.scales.float() * 1.05).bfloat16().half()  # bfloat16: what XNNPACK holds
        return replace(found, weight=replace(found.weight, scales=scales))


def linear_names(quantized: QuantizedCheckpoint) -> list[str]:
    """Every quantized weight of the decoder but the embedding."""
    blocks = range(quantized.config.num_layers)
    return [f"model.layers.{layer}.{name}" for layer in blocks for name in LINEARS] + ["lm_head"]
