"""`bluelm-export quantize`: a checkpoint to a quantized checkpoint, and nothing else.

`torchrun -m pipeline quantize …` starts it on several processes.
"""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from pipeline.errors import leave
from pipeline.options import options as o
from pipeline.options.recipe import recipe_values
from pipeline.terminal import console

if TYPE_CHECKING:
    import torch

    from bluelm.system.progress import Progress
    from bluelm.trust.signature import Trust
    from calibration.ranks import Ranks
    from calibration.samples import Samples
    from compress.checkpoint.store import QuantizedCheckpoint
    from compress.formats.write import Kind
    from compress.recipe import Recipe
    from compress.widths.allocate import Allowed
    from pipeline.run.source import Source

ModelFolder = Annotated[Path, typer.Argument(help="Hugging Face folder of a BlueLM or Llama checkpoint.")]
Format = Annotated[
    Literal["gptq", "awq", "compressed-tensors"] | None,
    typer.Option(
        help="Write a Hugging Face folder for other tools, embedding and head in float16. Default: bluelm-export's own "
        "folder, which its exporters read.",
        rich_help_panel=o.QUANTIZE,
    ),
]
OutFolder = Annotated[Path, typer.Argument(help="Folder of the quantized checkpoint; an unfinished one is completed.")]


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(quantize)


def quantize(
    context: typer.Context,
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
    device: o.QuantizeOn = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an OUT made with another recipe or text, finished or not.")
    ] = False,
    dry_run: o.DryRun = False,
    adapter: o.Adapter = None,
    format: Format = None,
    public_key: o.PublicKey = None,
    certificate_chain: o.CertificateChain = None,
    signed_at: o.SignedAt = None,
    stamp_authority: o.StampAuthority = None,
    require_signature: o.RequireSignature = False,
) -> None:
    """Quantize a checkpoint into a folder of codes, scales and zero points; or, with --format, into one that vLLM,
    transformers, GPTQModel or AutoAWQ load. A checkpoint that is quantized already keeps its codes.

    `torchrun --nproc-per-node N -m pipeline quantize …` shares the calibration samples and the layers out among N
    processes, on one machine or several: the codes are the same.
    """

    def work() -> int:
        from bluelm.adapters import parse_adapter
        from compress.recipe import Recipe
        from pipeline.options.effects import given_options
        from pipeline.run.provenance import trust_of

        chosen = recipe_values(context.params)
        job = Job(
            model=model,
            out=out,
            recipe=Recipe.load(recipe, **chosen),
            chosen=frozenset(chosen),
            adapters=tuple(map(parse_adapter, adapter or ())),
            format=format,
            calibration=tuple(calibration or ()),
            max_memory=max_memory,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            given=given_options(context),
            trust=trust_of(public_key, certificate_chain, signed_at, stamp_authority),
            signed=require_signature,
        )
        return run(job, console(), console(error=True))

    leave(work)


@dataclass(frozen=True)
class Job:
    """What the command was asked for."""

    model: Path
    out: Path
    recipe: Recipe
    chosen: frozenset[str]
    adapters: tuple[tuple[Path, float], ...]
    format: Kind | None
    calibration: tuple[Path, ...]
    max_memory: str | None
    device: str
    overwrite: bool
    dry_run: bool
    given: frozenset[str] = frozenset()  # options on the command line
    trust: Trust | None = None
    signed: bool = False  # --require-signature

    @property
    def codes(self) -> Path:
        """Our own folder, which another format is written from."""
        return self.out if self.format is None else self.out.with_name(f"{self.out.name}.codes")


def run(job: Job, output: Console, messages: Console) -> int:
    """Open everything, say what it takes, quantize, say where it lies and what it took."""
    from bluelm.system.memory import peak
    from bluelm.system.progress import Silent
    from calibration.ranks import join
    from pipeline.progress import show_progress, working
    from pipeline.run import provenance, resources
    from pipeline.run.source import open_source

    device = resources.compute_device(job.device)
    with join(device) as ranks:
        source = open_source(job.model, job.adapters, job.recipe, job.chosen)
        _check(job, source, messages)
        for folder in (source.checkpoint.folder, *(folder for folder, _ in job.adapters)):
            ranks.shared(lambda folder=folder: provenance.check(folder, job.trust, required=job.signed))
        with working(messages, "read the calibration text") if ranks.leads else nullcontext():
            samples, planned = _samples(job, source), None
        if source.given is None:
            planned = ranks.shared(
                lambda: resources.plan_quantizing(
                    source.checkpoint, source.recipe.own_widths(), job.max_memory, ranks.size
                )
            )
            if ranks.leads:
                resources.show_resources(planned, output if job.dry_run else messages)
        if job.dry_run:
            return 0
        begin, is_new = time.monotonic(), not any(path.exists() for path in (job.out, *_unfinished(job.codes)))
        with show_progress(messages) if ranks.leads else nullcontext(Silent()) as progress:
            if planned is not None:
                resources.check_disk(planned, job.codes)
                quantized = _choose_codes(job, source, samples, ranks, device, planned.quantizing.on_disk, progress)
            elif ranks.leads:
                quantized = source.quantize(None, job.codes, progress, overwrite=job.overwrite)
            else:
                return 0
            if ranks.leads:
                _write_format(job, source, quantized, progress)
        if ranks.leads:
            _tell(messages, f"Quantized checkpoint: {job.out}{f' ({job.format})' if job.format else ''}")
            if is_new and planned is not None and not source.recipe.auto:  # the estimate is of quantizing alone
                _tell(messages, resources.how_far_off(planned, peak(), time.monotonic() - begin))
    return 0


def _check(job: Job, source: Source, messages: Console) -> None:
    """Refuse what cannot be made, and warn of options that change nothing, before any work."""
    from compress.checkpoint.work import refuse_foreign
    from compress.formats.write import check_out, check_recipe
    from compress.widths.allocate import check_room
    from pipeline.options.effects import QUANTIZE, QuantizeFacts, refuse_idle

    facts = QuantizeFacts(source.recipe, source.given is not None, job.format is not None)
    for warning in refuse_idle(job.given, QUANTIZE, facts):
        _tell(messages, f"warning: {warning}")
    if job.format is not None:
        check_out(job.out)
        refuse_foreign(job.codes)  # which go in the end
        check_recipe(source.checkpoint.config, source.recipe, job.format)
    if source.recipe.auto:
        check_room(source.checkpoint.config, source.recipe, _allowed(job, source.recipe))


def _samples(job: Job, source: Source) -> Samples | None:
    """Calibration windows, for a recipe that reads text; the tokenizer is checked all the same."""
    from calibration.samples import load_samples

    recipe, tokenizer = source.recipe, source.checkpoint.tokenizer()
    if not recipe.reads_text:
        return None
    return load_samples(job.calibration or None, tokenizer, recipe.samples, recipe.length, recipe.seed)


def _allowed(job: Job, recipe: Recipe) -> Allowed:
    """The widths that `--bits auto` chooses from."""
    from compress.recipe import HEAD
    from compress.widths.allocate import Allowed

    allowed = Allowed.all(recipe)
    if job.format is None:
        return allowed
    # there the head is float16 whatever is chosen: nothing to take from it or give it
    return Allowed(allowed.blocks, (recipe.own_widths().widths(HEAD),))


def _choose_codes(
    job: Job,
    source: Source,
    samples: Samples | None,
    ranks: Ranks,
    device: torch.device,
    on_disk: bool,
    progress: Progress,
) -> QuantizedCheckpoint:
    """Our own folder of a float checkpoint, the widths chosen first where the recipe leaves that to us."""
    from compress import engine
    from pipeline.run import widths

    recipe, chosen = source.recipe, None
    if recipe.auto and samples is not None:
        tokens, allowed = samples.tokens, _allowed(job, recipe)
        chosen = ranks.shared(lambda: widths.choose_widths(source.checkpoint, tokens, source.recipe, allowed, progress))
        recipe = chosen.recipe
        if ranks.leads:
            _tell(console(error=True), chosen.summary)
    quantized = engine.quantize(
        source.checkpoint,
        samples,
        recipe,
        job.codes,
        progress,
        device=device,
        ranks=ranks,
        on_disk=on_disk,
        overwrite=job.overwrite,
    )
    if ranks.leads and chosen is not None:
        widths.save(chosen, quantized.folder)
    return quantized


def _write_format(job: Job, source: Source, quantized: QuantizedCheckpoint, progress: Progress) -> None:
    """The folder for other tools, and ours away."""
    from bluelm.errors import TargetError
    from bluelm.rope import max_context
    from compress.formats.plain import write_tokenizer
    from compress.formats.write import who_cannot_load, write
    from export.tokenizer import fast
    from pipeline.run import widths

    if job.format is None:
        return
    notes: list[str] = []

    def tokenizer(folder: Path) -> None:
        """As servers read it: tokenizer.json, and the template; where that cannot be, as it is."""
        try:
            fast.write_tokenizer(quantized, folder, max_context(quantized.config))
        except TargetError as error:
            notes.append(f"no tokenizer.json was made, which servers ask for: {error.problem}")
            write_tokenizer(quantized.folder, folder, quantized.config)

    # an error leaves the codes for the next call
    write(quantized, source.checkpoint, job.out, job.format, progress, tokenizer=tokenizer)
    for name in (widths.RECIPE, widths.TABLE):  # of --bits auto
        if (job.codes / name).exists():
            shutil.copyfile(job.codes / name, job.out / name)
    shutil.rmtree(job.codes)
    for note in filter(None, (who_cannot_load(quantized, job.format), *notes)):
        _tell(console(error=True), f"Note: {note}")


def _unfinished(folder: Path) -> tuple[Path, Path]:
    """Where an interrupted run leaves what the next one goes on from."""
    return folder, folder.with_name(f"{folder.name}.partial")


def _tell(messages: Console, text: Any) -> None:
    messages.print(text, highlight=False, soft_wrap=True, markup=False)
