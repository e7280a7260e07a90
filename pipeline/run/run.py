"""The whole way, from checkpoint to verdict; each stage is a folder of the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bluelm.errors import BudgetError
from bluelm.system.progress import Progress
from bluelm.system.reading import read_json
from compress.checkpoint.store import QuantizedCheckpoint
from compress.checkpoint.work import clear
from compress.recipe import Recipe
from eval.budget import budget as budgets
from eval.budget.budget_file import DEFAULT_BUDGET
from eval.files.memory import PeakMemory
from eval.history import History
from eval.measurement import Measurement
from eval.report import TOOLS, Built, Report, show, tool_versions
from eval.tasks.tasks import TaskRequest
from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from export.lowering.ranges import Ranges, calibrate
from export.onnx import cpu as onnx_cpu
from pipeline.commands.bundle import bundle_passed
from pipeline.commands.report import write_all
from pipeline.judge import judging
from pipeline.judge.inspecting import Inspector
from pipeline.judge.judging import Subject
from pipeline.judge.judging_tasks import judge_tasks
from pipeline.progress import show_progress, working
from pipeline.report.ci_outputs import announce
from pipeline.report.page import PAGE
from pipeline.run import layout, widths
from pipeline.run.binding import seal
from pipeline.run.given import check_foresees
from pipeline.run.identity import remember
from pipeline.run.phone import ChosenPhone, find_phone, measure_on
from pipeline.run.plan import RANGE_WINDOWS, Plan, Request, make_plan
from pipeline.run.recording import record
from pipeline.run.resources import check_disk, compute_device, how_far_off, show_resources
from pipeline.run.stages import Stages, code, run_folder
from pipeline.terminal import LogLine
from targets.runtime import only_on_device
from targets.tools import require_for

log = logging.getLogger("bluelm_export")
QUANTIZING = ("bluelm", "calibration", "compress")
LOWERING = ("bluelm", "compress", "export")
LOWERED_ALONE = ("cpu", "device")  # where artifacts run that need no compiler here


def run(request: Request, *, dry_run: bool, output: Console, messages: Console) -> int:
    """Do a run and print its report; the exit code is 0 or, if the budget fails, 3.

    Args:
        output: gets the report. messages: gets what is being done meanwhile.
    """
    if request.model is None:
        messages.print("No --model given: this is the small BlueLM that ships with the tool.", highlight=False)
    with working(messages, "read the checkpoint and the texts"):
        plan = make_plan(request)
    for warning in plan.warnings:
        messages.print(f"[yellow]warning[/] {escape(warning)}", highlight=False, soft_wrap=True)
    Stages(plan.folder).check(_stage_names(plan))
    phone = find_phone(plan)
    if request.history is not None:
        History(request.history).check()
    if dry_run:
        show_plan(plan, output)
        return 0
    require_for(plan.target.runtime)
    compute_device(request.quantize_on)  # there is one
    if plan.resources is not None:
        check_disk(plan.resources, plan.folder)
    began = time.monotonic()
    with run_folder(plan.folder) as folder, _log_to(folder / layout.LOG), PeakMemory() as peak:
        log.info("run of %s with %s", plan.title, plan.request)
        remember(folder, plan.settings)
        stages = Stages(folder, lambda text: messages.print(text, highlight=False, style="dim"))
        with show_progress(messages) as progress:
            report = _do(plan, stages, progress, peak, phone)
        report.save(folder)
        seal(folder)
        write_all(report, folder)
    if plan.resources is not None and not any(stage.reused for stage in report.stages):
        told = how_far_off(plan.resources, peak.bytes, time.monotonic() - began)
        messages.print(told, highlight=False, soft_wrap=True, style="dim")
    record(report, request.history, messages)
    show(report, output)
    output.print(f"\nReport: {folder / PAGE}, beside report.json", highlight=False, soft_wrap=True)
    announce(report)
    if request.bundle:
        bundle_passed(folder, report.passed, output, messages)
    output.print(f'Try it: bluelm-export generate {folder} --prompt "…"', highlight=False, soft_wrap=True)
    return 0 if report.passed else BudgetError.exit_code


def show_plan(plan: Plan, output: Console) -> None:
    """What a run would do, without doing it."""
    output.print(f"[bold]{escape(plan.title)}[/]", highlight=False)
    stages = Stages(plan.folder)
    for name in _stage_names(plan):
        output.print(f"  {name}", highlight=False)
    if plan.resources is not None:
        show_resources(plan.resources, output)
    output.print(f"Into {stages.folder}; nothing was written.", highlight=False, soft_wrap=True)


def _do(plan: Plan, stages: Stages, progress: Progress, peak: PeakMemory, phone: ChosenPhone | None) -> Report:
    """All stages, then the report.

    Raises:
        UnavailableError: the artifact is made, and nothing here can run it.
    """
    chosen: dict[str, Any] = {}
    if plan.recipe.auto:
        plan, chosen = _choose_widths(plan, stages, progress)
    if plan.source.given is not None:
        check_foresees(plan.checkpoint, plan.held_out, plan.tokenizer.vocab_size, progress)
    quantized = _quantize(plan, stages, progress)
    if plan.target.default_on == "device":
        raise only_on_device(_export_target(plan, stages, quantized, progress))
    if plan.target.default_on == "cpu":
        plain = plan.target.runtime == "onnx-cpu" and plan.target.kv_bits == 32
        export = _export_cpu if plain else _export_target
        shipped = export(plan, stages, quantized, progress)
        subjects = [Subject("cpu", shipped, "cpu", plan.request.eval_tokens)]
    else:
        cpu = _export_cpu(plan, stages, quantized, progress)
        npu = _export_target(plan, stages, quantized, progress)
        subjects = [
            Subject("npu", npu, plan.target.default_on, plan.request.npu_tokens),
            Subject("cpu", cpu, "cpu", plan.request.eval_tokens),
        ]
    no_room = judging.room_for_reference(plan.checkpoint, plan.resources.limit if plan.resources else None)
    context = min(subject.artifact.context for subject in subjects)
    inspector = Inspector(plan.checkpoint, quantized, plan.held_out, context, no_room is None)
    judged = judging.judged(inspector, subjects, stages, progress, reference=no_room is None)
    figures = [*judged.figures]
    if plan.tasks is not None:
        room = no_room is None
        figures += judge_tasks(plan.tasks, plan.checkpoint, subjects[0], stages, progress, reference=room)
    figures += judging.speed(subjects[-1], plan.held_out, progress)
    figures += judging.sizes(subjects[0].artifact, plan.target)
    if phone is not None:  # behind the estimate: what was measured counts
        figures += measure_on(phone, subjects[0].artifact, stages.folder / "device", progress)
    figures.append(peak.measurement())
    plan.checkpoint.check_unchanged()
    verdict = budgets.judge(plan.budget, figures, [s.name for s in subjects], judged.samples)
    return Report(
        passed=verdict.passed,
        title=plan.title,
        target=f"{plan.target.name} ({plan.target.soc.id})",
        artifacts={s.name: Built(folder=s.artifact.folder.name, on=s.on) for s in subjects},
        configuration=_configuration(plan),
        inputs={
            "checkpoint": plan.checkpoint.digest(),
            "calibration": plan.samples.report.sha256,
            "evaluation": plan.held_out.digest,
            "quantized": quantized.digest(),
        },
        versions=tool_versions(*_runners(subjects)),
        stages=tuple(stages.done),
        measurements=tuple(figures),
        budget=plan.budget.model_dump(mode="json", exclude_none=True),
        checks=verdict.checks,
        documents=judged.documents,
        details={**_details(plan, quantized, subjects, figures), **chosen, "runtimes": judged.runtimes},
        warnings=(*plan.warnings, *([no_room] if no_room else [])),
    )


def _runners(subjects: Sequence[Subject]) -> set[str]:
    """Packages of the programs that artifacts are judged in: an app's must have their versions."""
    found = (subject.artifact.record.runner for subject in subjects)
    return {runner.package for runner in found if isinstance(runner, StandardRunner)}


def _choose_widths(plan: Plan, stages: Stages, progress: Progress) -> tuple[Plan, dict[str, Any]]:
    """The plan with a width for every linear, and the table for the report."""
    recipe, config, sizes = plan.recipe, plan.checkpoint.config, plan.sizes
    allowed = widths.held_by(plan.target, config, recipe, **sizes)
    inputs = {
        "checkpoint": plan.checkpoint.digest(),
        "calibration": plan.samples.report.sha256,
        "recipe": recipe.digest(),
        "allowed": str(allowed),
        "made by": _made_by(QUANTIZING, "torch"),
    }

    def work(folder: Path) -> None:
        chosen = widths.choose_widths(plan.checkpoint, plan.samples.tokens, recipe, allowed, progress)
        folder.mkdir()
        widths.save(chosen, folder)

    folder = stages.run(layout.WIDTHS, inputs, work)
    resolved = Recipe.load(folder / widths.RECIPE)
    for _, uniform in resolved.uniform():
        plan.target.check(config, uniform, **sizes)
    table = read_json(folder / widths.TABLE)
    return replace(plan, source=replace(plan.source, recipe=resolved)), {"widths": table}


def _quantize(plan: Plan, stages: Stages, progress: Progress) -> QuantizedCheckpoint:
    inputs = {
        "checkpoint": plan.checkpoint.digest(),
        "calibration": plan.samples.report.sha256,
        "recipe": plan.recipe.digest(),
        "device": plan.request.quantize_on.partition(":")[0],
        "made by": _made_by(QUANTIZING, "torch"),
    }

    def work(folder: Path) -> None:
        names = plan.checkpoint.tensors if plan.source.given is None else ()  # codes were read by the plan
        with progress.task("read the checkpoint", total=len(names)) as task:
            for name in names:  # a NaN is found now, not hours later in the last block
                plan.checkpoint.tensor(name)
                task.advance(note=name)
        on_disk = plan.resources is not None and plan.resources.quantizing.on_disk
        device = compute_device(plan.request.quantize_on)
        plan.source.quantize(plan.samples, folder, progress, device=device, on_disk=on_disk)

    return QuantizedCheckpoint.open(stages.run(layout.QUANTIZED, inputs, work, clear))


def _export_cpu(plan: Plan, stages: Stages, quantized: QuantizedCheckpoint, progress: Progress) -> Artifact:
    sizes = plan.sizes
    inputs = {
        "quantized": quantized.digest(),
        **sizes,
        "made by": _made_by(LOWERING, "onnx"),
    }

    def work(folder: Path) -> None:
        onnx_cpu.export(quantized, folder, context=sizes["context"], chunk=sizes["chunk"], progress=progress)

    return Artifact.open(stages.run(layout.ONNX_CPU, inputs, work))


def _export_target(plan: Plan, stages: Stages, quantized: QuantizedCheckpoint, progress: Progress) -> Artifact:
    """What the target's runtime loads: activation ranges where it needs them, the graphs, and the compiler's binary."""
    tokens = plan.samples.tokens[:RANGE_WINDOWS]
    inputs: dict[str, Any] = {
        "quantized": quantized.digest(),
        "calibration": plan.samples.report.sha256,
        "windows": list(tokens.shape),
        "made by": _made_by(LOWERING, "torch"),
    }

    def watch(folder: Path) -> None:
        folder.mkdir()
        calibrate(quantized, tokens, progress).save(folder / "ranges.json")

    ranges = None
    if plan.target.needs_ranges:
        ranges = Ranges.load(stages.run(layout.RANGES, inputs, watch) / "ranges.json")
        ranges = ranges.model_copy(update={"activation_bits": plan.request.activation_bits or 16})
    sizes = plan.sizes
    inputs |= {
        "activation_bits": plan.request.activation_bits,
        **sizes,
        "kv_bits": plan.target.kv_bits,
        "target": plan.target.name,
        "about": plan.about,
        "made by": _made_by(LOWERING, "onnx"),
    }
    lowered = stages.run(
        layout.lowered(plan.target.runtime),
        inputs,
        lambda folder: plan.target.lower(quantized, ranges, folder, **sizes, about=plan.about, progress=progress),
    )
    if plan.target.default_on in LOWERED_ALONE:
        return Artifact.open(lowered)  # nothing to compile
    inputs |= {
        "soc": plan.target.soc.id,
        "runtime": plan.target.runtime,
        "made by": _made_by((*LOWERING, "targets"), *TOOLS),
    }
    compiled = stages.run(
        layout.COMPILED,
        inputs,
        lambda folder: plan.target.compile(Artifact.open(lowered), folder, progress),
    )
    return Artifact.open(compiled if compiled.is_dir() else lowered)  # some runtimes compile on the phone


def _made_by(packages: tuple[str, ...], *tools: str) -> dict[str, str]:
    """What besides its input decides a stage's result: our code, and the tools that it uses."""
    versions = tool_versions()
    return {"code": code(*packages), **{tool: versions[tool] for tool in tools}}


def _stage_names(plan: Plan) -> list[str]:
    """Folders that the run would write, in order."""
    names = [layout.WIDTHS] if plan.recipe.auto else []
    names += [layout.QUANTIZED]
    if plan.target.default_on == "device":
        return [*names, layout.lowered(plan.target.runtime)]
    names += [layout.ONNX_CPU] if plan.target.default_on != "cpu" else []
    names += [layout.RANGES] if plan.target.needs_ranges else []
    names += [layout.lowered(plan.target.runtime)]
    names += [layout.COMPILED] if plan.target.default_on != "cpu" else []
    return [*names, layout.JUDGED, *([layout.TASKS] if plan.tasks else [])]


def _configuration(plan: Plan) -> dict[str, Any]:
    """The request as it was resolved."""
    request = plan.request
    return {
        "model": str(plan.checkpoint.folder),
        "target": plan.target.name,
        "soc": plan.target.soc.id,
        "adapters": {str(folder): weight for folder, weight in request.adapters},
        "recipe": plan.recipe.model_dump(mode="json"),
        "activation_bits": request.activation_bits,
        "context": request.context,
        "chunk": plan.sizes["chunk"],
        "calibration": plan.samples.report.name,
        "evaluation": plan.held_out.source,
        "eval_tokens": request.eval_tokens,
        "npu_tokens": request.npu_tokens,
        "tasks": _plain(request.tasks),
        "budget": str(request.budget or DEFAULT_BUDGET),
    }


def _plain(tasks: TaskRequest | None) -> dict[str, Any] | None:
    return None if tasks is None else {**asdict(tasks), "data": str(tasks.data or "hub"), "names": list(tasks.names)}


def _details(
    plan: Plan, quantized: QuantizedCheckpoint, subjects: Sequence[Subject], figures: Sequence[Measurement]
) -> dict[str, Any]:
    """What the stages say of themselves."""
    return {
        "model": asdict(plan.checkpoint.config),
        "provenance": plan.provenance,
        "calibration": plan.samples.report.to_json(),
        "evaluation": {"tokens": dict(plan.held_out.judged), "documents": dict(plan.held_out.documents)},
        "quantized": quantized.info,
        "artifacts": {s.name: s.artifact.model_dump(mode="json") for s in subjects},
        "not_known": judging.not_known(subjects, figures),
    }


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """What is told goes into the run's log as well; after an error the log stays open for its traceback."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(LogLine("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    yield
    log.removeHandler(handler)
    handler.close()
