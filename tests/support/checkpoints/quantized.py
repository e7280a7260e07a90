"""Quantized checkpoints for the tests of exporters: the demo, and small random ones of every architecture."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from calibration.samples import CalibrationReport, Samples, load_samples
from compress.checkpoint.quantized import OrderedWeight
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from tests.support.checkpoints.shapes import LINEARS

RTN = {"method": "rtn", "samples": 1, "length": 16}


def quantized_demo(folder: Path) -> QuantizedCheckpoint:
    """The demo checkpoint, 4 bits in groups of 32, rounded to nearest."""
    checkpoint = Checkpoint.open(demo_checkpoint())
    recipe = Recipe.make(RTN)
    samples = load_samples(None, checkpoint.tokenizer(), recipe.samples, recipe.length, recipe.seed)
    return quantize(checkpoint, samples, recipe, folder)


def quantized(source: Path, folder: Path, **recipe: Any) -> QuantizedCheckpoint:
    """Any checkpoint without a tokenizer, rounded to nearest."""
    chosen = Recipe.make({**RTN, **recipe})
    report = CalibrationReport("none", "", 0, 0, 1, 16, 16, 0, 0.0, 0.0, 0.0, 0.0, ())
    return quantize(Checkpoint.open(source), Samples(torch.arange(16)[None], report), chosen, folder)


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
