"""`bluelm-export quantize`: a checkpoint to a quantized checkpoint, and nothing else.

`python -m pipeline.quantize …` is the same command, so that torchrun can start it.
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
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
    size: o.Size = None,
    max_kl: o.MaxKl = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    refine: o.Refine = None,
    rotate: o.Rotate = None,
    head_bits: o.HeadBits = None,
    embed_bits: o.EmbedBits = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    length: o.Length = None,
    seed: o.Seed = None,
    activations: o.Activations = None,
    max_memory: o.MaxMemory = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, or cuda:1 for one GPU of several.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what lies at OUT, finished or not, of another recipe or text.")
    ] = False,
    dry_run: o.DryRun = False,
) -> None:
    """Quantize a checkpoint into a folder of codes, scales and zero points.

    `torchrun --nproc-per-node N -m pipeline.quantize …` shares the calibration samples and the layers out among N
    processes, on one machine or several: the codes are the same.
    """

    def work() -> int:
        from compress.recipe import Recipe

        chosen = {
            "method": method,
            "bits": o.width(bits),
            "size": size,
            "max_kl": max_kl,
            "group_size": o.number(group_size),
            "symmetric": symmetric,
            "refine": refine,
            "rotate": rotate,
            "head_bits": o.number(head_bits),
            "embed_bits": o.number(embed_bits),
            "samples": samples,
            "length": length,
            "seed": seed,
            "activations": activations,
        }
        asked = Recipe.load(recipe, **{key: value for key, value in chosen.items() if value is not None})
        job = Job(model, out, asked, tuple(calibration or ()), max_memory, device, overwrite, dry_run)
        return run(job, Console(), Console(stderr=True))

    leave(work)


@dataclass(frozen=True)
class Job:
    """What the command was asked for."""

    model: Path
    out: Path
    recipe: Recipe
    calibration: tuple[Path, ...]
    max_memory: str | None
    device: str
    overwrite: bool
    dry_run: bool


def run(job: Job, output: Console, messages: Console) -> int:
    """Open everything, say what it takes, quantize, say where it lies and what it took."""
    from bluelm.checkpoint import Checkpoint
    from bluelm.progress import Silent
    from calibration.ranks import join
    from calibration.samples import load_samples
    from compress import engine
    from pipeline import resources, widths
    from pipeline.plan import model_folder
    from pipeline.progress import show_progress

    device = resources.compute_device(job.device)
    with join(device) as ranks:
        checkpoint = Checkpoint.open(model_folder(job.model))
        recipe, samples, chosen = job.recipe, None, None
        engine.check(checkpoint.config, recipe.own_widths())
        if recipe.reads_text:
            tokenizer = checkpoint.tokenizer()
            samples = load_samples(job.calibration or None, tokenizer, recipe.samples, recipe.length, recipe.seed)
        planned = ranks.shared(
            lambda: resources.plan_quantizing(checkpoint, recipe.own_widths(), job.max_memory, ranks.size)
        )
        if ranks.leads:
            resources.show_resources(planned, output if job.dry_run else messages)
        if job.dry_run:
            return 0
        resources.check_disk(planned, job.out)
        begin, is_new = (
            time.monotonic(),
            not job.out.exists() and not job.out.with_name(f"{job.out.name}.partial").exists(),
        )
        with show_progress(messages) if ranks.leads else nullcontext(Silent()) as progress:
            if recipe.auto and samples is not None:
                asked, tokens = recipe, samples.tokens
                chosen = ranks.shared(lambda: widths.choose_widths(checkpoint, tokens, asked, None, progress))
                recipe = chosen.recipe
                if ranks.leads:
                    _tell(messages, chosen.summary)
            quantized = engine.quantize(
                checkpoint,
                samples,
                recipe,
                job.out,
                progress,
                device=device,
                ranks=ranks,
                on_disk=planned.quantizing.on_disk,
                overwrite=job.overwrite,
            )
        if ranks.leads:
            if chosen is not None:
                widths.save(chosen, quantized.folder)
            _tell(messages, f"Quantized checkpoint: {quantized.folder}")
            if is_new and chosen is None:  # the estimate is of quantizing alone
                _tell(messages, resources.how_far_off(planned, _peak(), time.monotonic() - begin))
    return 0


def _peak() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tell(messages: Console, text: Any) -> None:
    messages.print(text, highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Entry point of `python -m pipeline.quantize`."""
    from pipeline.cli import main as command_line

    command_line(["quantize", *sys.argv[1:]])


if __name__ == "__main__":
    main()
