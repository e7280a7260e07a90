"""What a run will do, worked out and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.text.tokenizer import Message, Tokenizer
from calibration.samples import Samples, load_samples
from compress import methods
from compress.recipe import Recipe
from eval import heldout
from eval.budget import budget_file
from eval.budget.budget_file import DEFAULT_BUDGET
from eval.budget.limits import Budget
from eval.budget.sufficient import check_text
from eval.heldout import HeldOut
from eval.speed import estimate
from eval.tasks.tasks import CODE_TASKS, TaskRequest, TaskSet
from eval.tasks.tasks import load as load_tasks
from export.artifacts.package import parameter_count
from pipeline.options.effects import RUN, RunFacts, refuse_idle
from pipeline.run.identity import check_settings, slug, unusual
from pipeline.run.provenance import about, admit, trust_of
from pipeline.run.resources import Resources, plan_run
from pipeline.run.source import Source, open_source
from pipeline.run.widths import check_size
from targets.registry import find
from targets.target import Target

RANGE_WINDOWS = 32  # calibration windows that activation ranges are taken from


@dataclass(frozen=True)
class Request:
    """What the user asked for; the help texts in `pipeline/options/options.py` say what each means."""

    target: str
    soc: str | None
    runtime: str | None
    model: Path | None
    out: Path
    name: str | None
    recipe: Recipe
    calibration: tuple[Path, ...]
    context: int
    eval_texts: tuple[Path, ...]
    eval_tokens: int
    npu_tokens: int
    budget: Path | None
    chunk: int = 128
    kv_bits: int | None = None
    activation_bits: int | None = None
    device_ram: float | None = None
    device: str | None = None
    runner_config: Path | None = None
    allow_other_soc: bool = False
    history: Path | None = None
    public_key: Path | None = None
    certificate_chain: tuple[Path, ...] = ()
    signed_at: str | None = None
    stamp_authority: tuple[Path, ...] = ()
    require_signature: bool = False
    bundle: bool = True
    overwrite: bool = False
    max_memory: str | None = None
    quantize_on: str = "cpu"
    tasks: TaskRequest | None = None
    adapters: tuple[tuple[Path, float], ...] = ()
    chosen: frozenset[str] = frozenset()  # values of the recipe that were given as options
    given: frozenset[str] = frozenset()  # options on the command line
    shared_options: bool = False


@dataclass(frozen=True)
class Plan:
    """A request with everything in it opened and checked."""

    request: Request
    target: Target
    source: Source
    tokenizer: Tokenizer
    samples: Samples
    held_out: HeldOut
    budget: Budget
    folder: Path
    provenance: dict[str, Any]
    settings: dict[str, Any]
    tasks: TaskSet | None = None
    resources: Resources | None = None
    idle: tuple[str, ...] = ()  # warnings of options that change nothing

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    @property
    def recipe(self) -> Recipe:
        """What the codes are chosen by, or what describes those that are there."""
        return self.source.recipe

    @property
    def model_name(self) -> str:
        return model_name(self.request)

    @property
    def about(self) -> dict[str, str]:
        """What artifacts say of the model."""
        return about(self.checkpoint.folder, self.model_name)

    @property
    def sizes(self) -> dict[str, int]:
        """Context and prefill chunk of the graphs."""
        context = self.request.context
        return {"context": context, "chunk": min(self.request.chunk, context)}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before believing the result."""
        both = {p.resolve() for p in self.request.calibration} & {p.resolve() for p in self.request.eval_texts}
        leak = (f"judged on text that it was calibrated with: {', '.join(sorted(p.name for p in both))}",)
        text = self.samples.report.warnings + self.held_out.notes
        return self.source.warnings + text + (leak if both else ()) + self.idle

    @property
    def title(self) -> str:
        """Model, recipe and chip in one line."""
        return f"{self.model_name}, {recipe_in_words(self.recipe)}, on {self.target.soc.name}"


def make_plan(request: Request) -> Plan:
    """Open and check everything that the run needs; write nothing.

    Raises:
        InputError: anything that cannot be used. TargetError: the target cannot hold this model.
    """
    target = find(
        request.target,
        request.soc,
        request.runtime,
        kv_bits=request.kv_bits,
        activation_bits=request.activation_bits,
        device_ram_gb=request.device_ram,
    )
    source = open_source(request.model, request.adapters, request.recipe, request.chosen)
    checkpoint = source.checkpoint
    budget = budget_for(request.budget, target, parameter_count(checkpoint.config))
    if source.given is not None:  # held against its own codes, an artifact may well answer as the checkpoint does
        budget = budget.model_copy(update={"two_sided": False})
    tokenizer = checkpoint.tokenizer()
    tokenizer.check_chat([Message("user", "?")], add_generation_prompt=True)
    recipe, context = source.recipe, request.context
    if recipe.bits == 3:
        raise InputError("3 bits are for comparing quantizers; no target takes them", fix="choose 4 or 8 bits")
    if request.activation_bits == 32 and target.needs_ranges:
        raise InputError(
            f"the runtime {target.runtime} does not support --activation-bits 32", fix="use --activation-bits 8 or 16"
        )
    idle = refuse_idle(request.given, RUN, _facts(request, target, source), shared=request.shared_options)
    if "--chunk" in request.given and request.chunk > context:
        problem = f"--chunk {request.chunk} is more than --context {context} holds"
        raise InputError(problem, fix=f"give --chunk {context} or less, or a larger --context")
    source.check_runtime(target.runtime)
    for one in (recipe.own_widths(), *(same for _, same in recipe.uniform())):
        target.check(checkpoint.config, one, context=context, chunk=min(request.chunk, context))
    target.check_tokenizer(checkpoint.folder, checkpoint.config)
    if recipe.auto:
        check_size(target, checkpoint.config, recipe, context=context, chunk=min(request.chunk, context))
    trust = trust_of(request.public_key, request.certificate_chain, request.signed_at, request.stamp_authority)
    provenance = admit(checkpoint.folder, trust, required=request.require_signature)
    if request.adapters:
        provenance["adapters"] = {
            str(folder): admit(folder, trust, required=request.require_signature) for folder, _ in request.adapters
        }
    samples = load_samples(request.calibration or None, tokenizer, recipe.samples, recipe.length, recipe.seed)
    held_out = heldout.load(request.eval_texts, tokenizer, length=min(heldout.LENGTH, context))
    judged_on = {"--eval-tokens": request.eval_tokens}
    if target.default_on != "cpu":
        judged_on["--npu-tokens"] = request.npu_tokens
    if target.default_on != "device":
        check_text(held_out, budget, judged_on)
    name = request.name or default_name(request, target, recipe, samples)
    if Path(name).name != name:
        raise InputError(f"--name {name!r} is not the name of a folder", fix="give the place with --out")
    folder = request.out / name
    settings = _settings(request, target, source, samples)
    check_settings(folder, settings, request.overwrite)
    tasks = load_tasks(request.tasks) if request.tasks else None
    resources = plan_run(
        checkpoint,
        recipe,
        request.max_memory,
        runtime=target.runtime,
        context=context,
        chunk=min(request.chunk, context),
        watched_tokens=RANGE_WINDOWS * recipe.length if target.needs_ranges else 0,
        cpu_tokens=request.eval_tokens,
        npu_tokens=request.npu_tokens if target.default_on == "htp" else 0,
    )
    return Plan(
        request, target, source, tokenizer, samples, held_out, budget, folder, provenance, settings, tasks, resources,
        idle,
    )  # fmt: skip


def _facts(request: Request, target: Target, source: Source) -> RunFacts:
    return RunFacts(
        recipe=source.recipe,
        place=target.default_on,
        ranges=target.needs_ranges,
        given=source.given is not None,
        phone=request.device is not None,
        runs_code=request.tasks is not None and any(name in CODE_TASKS for name in request.tasks.names),
    )


def budget_for(path: Path | None, target: Target, parameters: int) -> Budget:
    """The limits for this target and size of model.

    Without a file: the bundled ones, but for the speed on a chip whose speed is not known.
    """
    names = (target.runtime, target.name, target.soc.id)
    budget = budget_file.load(path or DEFAULT_BUDGET, names=names, parameters=parameters)
    if path is None and estimate.chip(target.soc.name) is None:
        return budget.model_copy(update={"min_decode_tokens_per_s": None})
    return budget


def model_name(request: Request) -> str:
    """The checkpoint folder's name, the demo's own where none was given, and the adapters' names behind it."""
    model = "bluelm-demo" if request.model is None else request.model.resolve().name
    return "+".join([model, *(folder.resolve().name for folder, _ in request.adapters)])


def default_name(request: Request, target: Target, recipe: Recipe, samples: Samples) -> str:
    """A folder's name that says all that makes another artifact, some of it as a short digest."""
    chosen = {
        "context": request.context,
        "chunk": min(request.chunk, request.context),
        "kv_bits": request.kv_bits,
        "activation_bits": request.activation_bits,
        "calibration": samples.report.sha256 if request.calibration else None,
        "adapters": [weight for _, weight in request.adapters if weight != 1] or None,
    }
    usual = {"context": 512, "chunk": min(128, request.context), "kv_bits": None, "activation_bits": None}
    digest = unusual(recipe, {key: value for key, value in chosen.items() if value != usual.get(key)})
    runtime = target.runtime if target.runtime != find(target.name, target.soc.id).runtime else ""
    parts = (model_name(request), slug(recipe), target.soc.id.lower(), runtime, digest)
    return "-".join(part for part in parts if part)


def _settings(request: Request, target: Target, source: Source, samples: Samples) -> dict[str, Any]:
    """What a run's artifacts are made by, for the run's folder."""
    return {
        "model": str(source.checkpoint.folder.resolve()),
        "checkpoint": source.checkpoint.digest(),
        "target": target.name,
        "soc": target.soc.id,
        "runtime": target.runtime,
        "recipe": source.recipe.model_dump(mode="json"),
        "calibration": samples.report.sha256,
        "context": request.context,
        "chunk": min(request.chunk, request.context),
        "kv_bits": target.kv_bits,
        "activation_bits": request.activation_bits,
        "adapters": [[folder.resolve().name, weight] for folder, weight in request.adapters],
    }


def recipe_in_words(recipe: Recipe) -> str:
    """A recipe in words, e.g. "GPTQ 4-bit, groups of 32, symmetric"."""
    groups = "one scale a row" if recipe.group_size == -1 else f"groups of {recipe.group_size}"
    zeros = "symmetric" if recipe.symmetric else "asymmetric"
    method = methods.entry(recipe.method).title
    if recipe.auto:
        return f"{method} at 4 or 8 bits by linear, {zeros}"
    if recipe.layers:
        groups += f" ({len(recipe.layers)} linears otherwise)"
    return f"{method} {recipe.bits}-bit, {groups}, {zeros}"
