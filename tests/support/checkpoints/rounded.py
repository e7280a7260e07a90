"""Quantized checkpoints without calibration: the demo model, or its first blocks, rounded to nearest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import TOKENIZER_FILES
from calibration.samples import load_samples
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from tests.support.checkpoints.shapes import LINEARS


def rounded(
    folder: Path, *, source: Path | None = None, layers: int | None = None, **recipe: object
) -> QuantizedCheckpoint:
    """Write the first `layers` blocks of a checkpoint (default: the demo model) as a quantized one."""
    made = Recipe.make({"method": "rtn", "samples": 1, "length": 8, **recipe})
    source = source or demo_checkpoint()
    if layers is not None:
        source = shortened(source, layers, folder.with_name(f"{folder.name}-float"))
    checkpoint = Checkpoint.open(source)
    tokenizer = checkpoint.tokenizer()
    return quantize(checkpoint, load_samples(None, tokenizer, 1, 8, 0), made, folder)


def shortened(source: Path, layers: int, folder: Path) -> Path:
    """A float checkpoint of the first `layers` blocks alone."""
    checkpoint = Checkpoint.open(source)
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    gone = tuple(f"model.layers.{index}." for index in range(layers, checkpoint.config.num_layers))
    kept = {name: checkpoint.tensor(name) for name in checkpoint.tensors if not name.startswith(gone or "-")}
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in kept.items()}, folder / "model.safetensors")
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    return folder


def linear_names(quantized: QuantizedCheckpoint) -> list[str]:
    """Every quantized weight of the decoder but the embedding."""
    blocks = range(quantized.config.num_layers)
    return [f"model.layers.{layer}.{name}" for layer in blocks for name in LINEARS] + ["lm_head"]
