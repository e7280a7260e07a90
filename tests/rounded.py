"""Quantized checkpoints without calibration: the demo model, or its first blocks, rounded to nearest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from bluelm.checkpoint import Checkpoint
from bluelm.files import demo_checkpoint
from bluelm.tokenizer import TOKENIZER_FILES
from bluelm.weights import LINEARS
from compress.grid import choose_grid
from compress.recipe import Recipe
from compress.store import (
    EMBED,
    EMBED_FILE,
    FINAL_NORM,
    HEAD,
    HEAD_FILE,
    QuantizedCheckpoint,
    block_file,
    write_index,
    write_part,
)


def rounded(
    folder: Path, *, source: Path | None = None, layers: int | None = None, **recipe: object
) -> QuantizedCheckpoint:
    """Write the first `layers` blocks of a checkpoint (default: the demo model) as a quantized one."""
    made = Recipe.make({"method": "rtn", **recipe})
    checkpoint = Checkpoint.open(source or demo_checkpoint())
    config = replace(checkpoint.config, num_layers=layers or checkpoint.config.num_layers)
    folder.mkdir(parents=True)

    def nearest(name: str, bits: int, group: int, symmetric: bool = True):
        weight = {EMBED: checkpoint.embedding, HEAD: checkpoint.head}.get(
            name, lambda: checkpoint.tensor(f"{name}.weight")
        )()
        return choose_grid(weight, bits, group, symmetric).nearest(weight)

    files: list[str] = []
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        linears = {
            name: nearest(f"{at}.{name}", made.bits, made.group_size, made.symmetric) for name in LINEARS
        }
        vectors = {key: value for key, value in checkpoint.block(layer).items() if value.ndim == 1}
        write_part(folder / block_file(layer), linears, vectors, {})
        files.append(block_file(layer))
    head = nearest(HEAD, made.head_bits, made.head_group_size)
    write_part(folder / HEAD_FILE, {HEAD: head}, {f"{FINAL_NORM}.weight": checkpoint.final_norm()}, {})
    write_part(folder / EMBED_FILE, {EMBED: nearest(EMBED, made.embed_bits, -1)}, {}, {})
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).exists():
            shutil.copyfile(checkpoint.folder / name, folder / name)
            files.append(name)
    write_index(folder, config, made, {"checkpoint": "demo"}, [*files, HEAD_FILE, EMBED_FILE])
    return QuantizedCheckpoint.open(folder)


def linear_names(quantized: QuantizedCheckpoint) -> list[str]:
    """Every quantized weight of the decoder but the embedding."""
    blocks = range(quantized.config.num_layers)
    return [f"model.layers.{layer}.{name}" for layer in blocks for name in LINEARS] + [HEAD]
