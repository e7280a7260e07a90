"""`bluelm-export quantize`: a checkpoint to a quantized checkpoint, and nothing else.

`python -m pipeline.quantize …` is the same command, so that torchrun can start it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline import options as o
from pipeline.errors import leave

if TYPE_CHECKING:
    from compress.recipe import Recipe

ModelFolder = Annotated[Path, typer.Argument(help="Hugging Face folder of a BlueLM or Llama checkpoint.")]
OutFolder = Annotated[Path, typer.Argument(help="Folder of the quantized checkpoint; an unfinished one is completed.")]


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(quantize)


def quantize(
    model: ModelFolder,
    out: OutFolder,
    recipe: o.RecipeName = "w4-g32",
    method: o.Method = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    refine: o.Refine = None,
    head_bits: o.HeadBits = None,
    embed_bits: o.EmbedBits = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    length: o.Length = None,
    seed: o.Seed = None,
) -> None:
    """Quantize a checkpoint into a folder of codes, scales and zero points."""

    def work() -> int:
        from compress.recipe import Recipe

        chosen = {
            "method": method,
            "bits": o.number(bits),
            "group_size": o.number(group_size),
            "symmetric": symmetric,
            "refine": refine,
            "head_bits": o.number(head_bits),
            "embed_bits": o.number(embed_bits),
            "samples": samples,
            "length": length,
            "seed": seed,
        }
        asked = Recipe.load(recipe, **{key: value for key, value in chosen.items() if value is not None})
        return run(model, out, asked, tuple(calibration or ()), Console(stderr=True))

    leave(work)


def run(model: Path, out: Path, recipe: Recipe, calibration: tuple[Path, ...], messages: Console) -> int:
    """Open everything, quantize, say where it lies."""
    from bluelm.checkpoint import Checkpoint
    from calibration.samples import load_samples
    from compress import engine
    from pipeline.plan import model_folder
    from pipeline.progress import show_progress

    checkpoint = Checkpoint.open(model_folder(model))
    samples = None
    if recipe.reads_text:
        tokenizer = checkpoint.tokenizer()
        samples = load_samples(calibration or None, tokenizer, recipe.samples, recipe.length, recipe.seed)
    with show_progress(messages) as progress:
        quantized = engine.quantize(checkpoint, samples, recipe, out, progress)
    _tell(messages, f"Quantized checkpoint: {quantized.folder}")
    return 0


def _tell(messages: Console, text: Any) -> None:
    messages.print(text, highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Entry point of `python -m pipeline.quantize`."""
    from pipeline.cli import main as command_line

    command_line(["quantize", *sys.argv[1:]])


if __name__ == "__main__":
    main()
