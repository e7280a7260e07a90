"""Judging finished artifacts without making anything: opening what they are compared with, then the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.system.progress import Progress
from compress.checkpoint.store import QuantizedCheckpoint
from compress.formats.packed import PackedCheckpoint
from compress.recipe import Recipe
from eval import heldout
from eval.budget import budget as budgets
from eval.budget.limits import Budget
from eval.budget.sufficient import check_text
from eval.heldout import HeldOut
from eval.report import FILE, Built, Report, tool_versions
from export.artifacts.artifact import MANIFEST, Artifact
from pipeline.commands.report import write_all
from pipeline.judge import judging
from pipeline.judge.inspecting import Inspector
from pipeline.judge.judging import Subject
from pipeline.options.effects import EVALUATE, EvaluateFacts, refuse_idle
from pipeline.run import layout, provenance
from pipeline.run.binding import seal
from pipeline.run.plan import budget_for
from pipeline.run.source import open_source
from pipeline.run.stages import PREVIOUS, retire_reports
from targets.registry import find
from targets.runtime import natural
from targets.target import Target

TOKENS = {"npu": 4096, "cpu": 16384}


@dataclass(frozen=True)
class Asked:
    """The options of `evaluate`; None: the run's own, or the default."""

    path: Path
    reference: Path | None = None
    quantized: Path | None = None
    adapters: tuple[tuple[Path, float], ...] | None = None
    target: str | None = None
    soc: str | None = None
    budget: Path | None = None
    eval_texts: tuple[Path, ...] = ()
    eval_tokens: int | None = None
    npu_tokens: int | None = None
    report: Path | None = None
    given: frozenset[str] = frozenset()  # options on the command line


@dataclass(frozen=True)
class Opened:
    """Everything that judging needs.

    Attributes:
        earlier: the run's report so far; None for an artifact by itself.
        reference: None: accuracy against the float model is not measured.
        quantized: None: codes and scales are not compared.
    """

    asked: Asked
    earlier: Report | None
    subjects: tuple[Subject, ...]
    reference: Checkpoint | None
    quantized: QuantizedCheckpoint | None
    target: Target
    budget: Budget
    held_out: HeldOut
    warnings: tuple[str, ...]


def open_all(asked: Asked) -> Opened:
    """Open artifacts, checkpoints, text and budget.

    Raises:
        InputError: anything that cannot be used, or that does not belong together.
    """
    earlier = None if (asked.path / MANIFEST).is_file() else earlier_report(asked.path)
    subjects = _subjects(asked, earlier)
    artifact = subjects[0].artifact
    quantized = _quantized(asked, artifact)
    reference = _reference(asked, earlier, quantized)
    known = reference or quantized
    if known is None:
        fix = "name the float checkpoint with --reference, the quantized one with --quantized, or both"
        raise InputError("there is nothing to compare the artifact with", where=asked.path, fix=fix)
    refuse_idle(asked.given, EVALUATE, EvaluateFacts(reference is not None, frozenset(s.name for s in subjects)))
    target = _target(asked, earlier, artifact)
    context = min(subject.artifact.context for subject in subjects)
    held_out = heldout.load(asked.eval_texts, known.tokenizer(), length=min(heldout.LENGTH, context))
    warnings = held_out.notes
    if reference is None:
        warnings += ("no float checkpoint is named: accuracy is not measured; add --reference CHECKPOINT",)
    budget = _budget(asked, earlier, target, artifact, reference)
    if reference is not None:
        check_text(
            held_out, budget, {"--npu-tokens" if s.name == "npu" else "--eval-tokens": s.tokens for s in subjects}
        )
    return Opened(asked, earlier, subjects, reference, quantized, target, budget, held_out, warnings)


def judge_all(opened: Opened, progress: Progress) -> Report:
    """The report on what lies there."""
    checkpoint, subjects = opened.reference, opened.subjects
    no_room = None if checkpoint is None else judging.room_for_reference(checkpoint)
    context = min(subject.artifact.context for subject in subjects)
    recipe = opened.quantized.recipe if opened.quantized else None
    inspector = Inspector(checkpoint, opened.quantized, opened.held_out, context, no_room is None)
    compared = checkpoint is not None and no_room is None
    judged = judging.judge_artifacts(inspector, subjects, progress, compared)
    figures = [*judged.figures, *judging.speed(subjects[-1], opened.held_out, progress)]
    figures += judging.sizes(subjects[0].artifact, opened.target)
    verdict = budgets.judge(opened.budget, figures, [s.name for s in subjects], judged.samples)
    not_known = judging.not_known(subjects, figures)
    title = " + ".join(subject.artifact.format for subject in subjects)
    base = opened.earlier or Report(
        passed=False,
        title=f"{opened.asked.path.resolve().name} ({title}), on {opened.target.soc.name}",
        target=f"{opened.target.name} ({opened.target.soc.id})",
        artifacts={},
        configuration={
            "model": str(checkpoint.folder if checkpoint else ""),
            "target": opened.target.name,
            "soc": opened.target.soc.id,
            "recipe": recipe.model_dump(mode="json") if recipe else {},
        },
        inputs={},
        versions={},
        stages=(),
        measurements=(),
        budget={},
        checks=(),
    )
    digests = {"evaluation": opened.held_out.digest, "quantized": subjects[0].artifact.quantized_digest}
    digests |= {"checkpoint": checkpoint.digest()} if checkpoint else {}
    return base.model_copy(
        update={
            "passed": verdict.passed,
            "artifacts": {s.name: Built(folder=s.artifact.folder.name, on=s.on) for s in subjects},
            "inputs": {**base.inputs, **digests},
            "versions": tool_versions(),
            "stages": (),
            "measurements": tuple(figures),
            "budget": opened.budget.model_dump(mode="json", exclude_none=True),
            "checks": verdict.checks,
            "documents": judged.documents,
            "details": {
                **base.details,
                "model": asdict(subjects[0].artifact.model),
                "artifacts": {s.name: s.artifact.model_dump(mode="json") for s in subjects},
                "runtimes": judged.runtimes,
                "not_known": not_known,
            },
            "warnings": (*opened.warnings, *([no_room] if no_room else [])),
        }
    )


def keep(opened: Opened, report: Report) -> Path | None:
    """Write the report where it was asked for, else into the run; returns the folder, or None."""
    folder = opened.asked.report or (opened.asked.path if opened.earlier else None)
    if folder is None:
        return None
    own = opened.earlier is not None and folder.resolve() == opened.asked.path.resolve()
    if own:
        retire_reports(folder)
    report.save(folder)
    if own:
        seal(folder)
    write_all(report, folder)
    return folder


def earlier_report(run: Path) -> Report:
    """The report of a run, or the last one that was moved away.

    Raises:
        InputError: neither is there.
    """
    previous = run / PREVIOUS / FILE
    if not (run / FILE).is_file() and previous.is_file():
        return Report.read(previous)
    if not (run / FILE).is_file():
        fix = "name the folder of an artifact (it holds artifact.json) or of a run"
        raise InputError("this is neither an artifact nor a run that was judged", where=run, fix=fix)
    return Report.open(run)


def _subjects(asked: Asked, earlier: Report | None) -> tuple[Subject, ...]:
    folders = [asked.path] if earlier is None else [asked.path / built.folder for built in earlier.artifacts.values()]
    found: list[Subject] = []
    for folder in folders:
        artifact = Artifact.open(folder)
        on = natural(artifact.format)
        name = "npu" if on == "htp" else "cpu"
        count = (asked.npu_tokens if name == "npu" else asked.eval_tokens) or TOKENS[name]
        if earlier is not None and not (asked.npu_tokens if name == "npu" else asked.eval_tokens):
            count = int(earlier.configuration.get("npu_tokens" if name == "npu" else "eval_tokens", count))
        found.append(Subject(name, artifact, on, count))
    if not found:
        raise InputError("the run's report names no artifact", where=asked.path, fix="name an artifact's folder")
    return tuple(found)


def _quantized(asked: Asked, artifact: Artifact) -> QuantizedCheckpoint | None:
    """The one that was named, or lies beside the artifact; the artifact must say that it holds it."""
    beside = artifact.folder.resolve().parent / layout.QUANTIZED
    folder = asked.quantized or (beside if (beside / "quantized.json").is_file() else None)
    if folder is None:
        return None
    quantized = QuantizedCheckpoint.open(folder)
    if quantized.digest() != artifact.quantized_digest:
        raise InputError(
            "this is not the quantized checkpoint that the artifact was made of",
            where=folder,
            fix="name the one that it was made of with --quantized, or move this one away to do without",
        )
    return quantized


def _reference(asked: Asked, earlier: Report | None, quantized: QuantizedCheckpoint | None) -> Checkpoint | None:
    """The float checkpoint, adapters merged in; the one that the codes were chosen for, where that is known."""
    told = earlier.configuration if earlier else {}
    folder = asked.reference or (Path(str(told["model"])) if told.get("model") else None)
    if folder is None or (asked.reference is None and not folder.is_dir()):
        return None
    adapters = asked.adapters
    if adapters is None:
        adapters = tuple((Path(path), float(weight)) for path, weight in (told.get("adapters") or {}).items())
    recipe = quantized.recipe if quantized else Recipe.load("w4-g32")
    checkpoint = open_source(folder, adapters, recipe).checkpoint
    for each in (folder, *(adapter for adapter, _ in adapters)):
        provenance.check(each)
    if quantized is not None and checkpoint.digest() != quantized.info.get("checkpoint"):
        raise InputError(
            "this is not the checkpoint that the codes were chosen for",
            where=folder,
            fix="name the one that was quantized with --reference (and --adapter, where some were merged)",
        )
    return checkpoint


def _target(asked: Asked, earlier: Report | None, artifact: Artifact) -> Target:
    """What was named, else what run or artifact say, else the first target that has the runtime."""
    told: dict[str, Any] = earlier.configuration if earlier else {}
    name, soc = asked.target or told.get("target") or artifact.target, asked.soc or told.get("soc") or artifact.soc
    if name is None:
        owners = artifact.record.targets
        if not owners:
            raise InputError(
                f"nothing says what this {artifact.format} artifact is for", where=artifact.folder, fix="add --target"
            )
        name = owners[0]
    return find(name, soc if asked.target is None or asked.soc else None)


def _budget(
    asked: Asked, earlier: Report | None, target: Target, artifact: Artifact, reference: Checkpoint | None
) -> Budget:
    if asked.budget is None and earlier is not None:
        return Budget.model_validate(earlier.budget)
    named = replace(target, runtime=artifact.format)
    budget = budget_for(asked.budget, named, artifact.parameters)
    return budget.model_copy(update={"two_sided": False}) if isinstance(reference, PackedCheckpoint) else budget
