"""What rotating and balancing give a real model: of the codes, and of 8-bit activations beside them.

    python -m benchmarks.accuracy.rotation OUT --model FOLDER [--only RECIPE ...]

FOLDER is a Hugging Face folder that transformers computes: its answers are what every row is held against. Codes come
from the command that a user gives; they are judged by our decoder with what linears read rounded as runtimes round it
(`targets/host/rounding.py`). Writes results/accuracy/rotation.json and the page; rows that are not measured again stay.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import pages
from bluelm.model import Decoder
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from compress.recipe import Recipe
from eval import heldout
from targets.host.rounding import Rounding, by_token, in_blocks, rounding_inputs

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4-g32, not rotated": ("w4-g32", {"rotate": False, "balance": False}),
    "w4-g32": ("w4-g32", {}),
    "w4-g32, balanced": ("w4-g32", {"balance": True}),
    "w8, not rotated": ("w8", {"head_group_size": -1, "rotate": False, "balance": False}),
    "w8, not balanced": ("w8", {"head_group_size": -1, "balance": False}),
    "w8": ("w8", {"head_group_size": -1}),
}
"""Preset and what is laid over it, by the name of the row; a head as w4-g32's, so that tied models take it."""
SAMPLES, LENGTH, TOKENS = 32, 512, 4096
BLOCK = 32  # activations that share a scale in onnxruntime at level 4, beside such groups
COLUMNS = ("recipe", "KL of the codes", "with a range a token", "with blocks of 32")


def quantized(out: Path, name: str, model: Path) -> QuantizedCheckpoint:
    """Codes by the command line."""
    folder = out / re.sub(r"\W+", "-", name)
    preset, values = RECIPES[name]
    recipe = out / f"{folder.name}.yaml"
    recipe.write_text(Recipe.load(preset, **values).to_yaml(), encoding="utf-8")
    words = ["quantize", str(model), str(folder), "--recipe", str(recipe)]
    words += ["--samples", str(SAMPLES), "--length", str(LENGTH)]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return QuantizedCheckpoint.open(folder)


@cache
def windows(model: Path) -> tuple[Tensor, ...]:
    """Held-out tokens of the model's languages, int64 [n] each."""
    found = heldout.load([], Tokenizer.from_folder(model)).first(TOKENS)
    return tuple(torch.from_numpy(window.tokens) for window in found)


@cache
def exact(model: Path) -> tuple[Tensor, ...]:
    """Log-probabilities of transformers for each window, float32 [n, vocab]."""
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return tuple(network(tokens[None]).logits[0].log_softmax(-1) for tokens in windows(model))


@torch.no_grad()
def mean_kl(decoder: Decoder, texts: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Nats a token, summed in float64."""
    total, count = 0.0, 0
    for tokens, before in zip(texts, wanted, strict=True):
        found = decoder(tokens[None])[0].log_softmax(-1)
        total += float((before.exp() * (before - found)).sum(dtype=torch.float64))
        count += len(tokens)
    return total / count


def row(out: Path, name: str, model: Path) -> list[str]:
    """Three figures of one recipe."""
    decoder = Decoder.from_weights(quantized(out, name, model))
    roundings: tuple[Rounding | None, ...] = (None, by_token, lambda x: in_blocks(x, BLOCK))
    cells: list[str] = []
    for rounding in roundings:
        if rounding is None:
            found = mean_kl(decoder, windows(model), exact(model))
        else:
            with rounding_inputs(decoder, rounding):
                found = mean_kl(decoder, windows(model), exact(model))
        cells.append(f"{found:.4f}")
    return [name, *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts = windows(arguments.model)
    about: dict[str, Any] = {"samples": SAMPLES, "length": LENGTH, "tokens": sum(map(len, texts))}
    for name in arguments.only:
        made = row(arguments.out, name, arguments.model)
        print(made, flush=True)
        pages.save_rows("rotation", "measured", COLUMNS, [made], names=RECIPES, **about)


if __name__ == "__main__":
    main()
