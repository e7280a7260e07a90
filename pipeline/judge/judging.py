"""Judges the artifacts of a run: accuracy side by side, speed alone on the machine, sizes."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil
from pydantic import TypeAdapter

from bluelm.checkpoint import Checkpoint, file_shapes
from bluelm.system.files import atomic_folder
from bluelm.system.memory import give_back
from bluelm.system.progress import Progress
from bluelm.system.reading import MOST_TABLE_BYTES, read_bytes
from eval import heldout
from eval.accuracy import judge, sanity
from eval.accuracy.judge import DocumentSums
from eval.budget.confidence import Sample
from eval.files import structure
from eval.files.origin import origin
from eval.heldout import HeldOut
from eval.measurement import JSON_NUMBERS, Measurement
from eval.report import tool_versions
from eval.runner import held
from eval.speed import estimate
from eval.speed.speed import host_speed
from export.artifacts.artifact import Artifact
from pipeline.judge.inspecting import Inspector
from pipeline.run import layout
from pipeline.run.stages import Stages, code
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import Place, Runtime, open_runtime, run_of
from targets.target import Target

PROMPTS, PROMPT_TOKENS, GREEDY_TOKENS = 8, 32, 64  # that the artifact continues as the float model does, or not


@dataclass(frozen=True)
class Judged:
    """What judging found.

    Attributes:
        documents: by subject, the scores added up by document.
        runtimes: by subject, what ran it, with its version.
    """

    __pydantic_config__: ClassVar[Any] = JSON_NUMBERS
    figures: tuple[Measurement, ...] = ()
    documents: dict[str, DocumentSums] = field(default_factory=dict)
    runtimes: dict[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> dict[str, dict[str, Sample]]:
        """What stands behind a subject's errors, by domain."""
        return {name: sums.samples for name, sums in self.documents.items()}


JUDGED = TypeAdapter(Judged)


@dataclass(frozen=True)
class _JudgedOne:
    figures: list[Measurement]
    documents: DocumentSums | None
    runtime: str


@dataclass(frozen=True)
class Subject:
    """An artifact to judge, where it runs, and on how many tokens."""

    name: Literal["npu", "cpu"]
    artifact: Artifact
    on: Place
    tokens: int

    @property
    def sessions(self) -> int:
        """Runtimes that share the work: the simulator keeps one core busy, ONNX Runtime all of them."""
        return 2 if self.on == "htp" else 1


def room_for_reference(checkpoint: Checkpoint, limit: int | None = None) -> str | None:
    """None, or why the float model cannot be held beside the artifacts here, or within `limit` bytes."""
    weights = 4 * sum(math.prod(shape) for shape in file_shapes(checkpoint.config).values())
    available = min(psutil.virtual_memory().available, limit or math.inf)
    if weights < 0.9 * available:
        return None
    return (
        f"accuracy was not measured: the float32 model takes {weights / 1e9:.1f} GB of memory, "
        f"{available / 1e9:.1f} GB are available"
    )


def judged(
    inspector: Inspector, subjects: Sequence[Subject], stages: Stages, progress: Progress, *, reference: bool
) -> Judged:
    """Every artifact: what its files and its own weights tell, and accuracy against the float model.

    Args:
        reference: whether there is room for the float model; without it there are no figures of accuracy.
    """
    held_out = inspector.held_out
    checkpoint, quantized = inspector.checkpoint, inspector.quantized
    inputs: dict[str, Any] = {
        "checkpoint": checkpoint and checkpoint.digest(),
        "quantized": quantized and quantized.digest(),
        "text": [held_out.digest, held_out.length],
        "reference": reference,
        "subjects": {s.name: [s.artifact.model_dump(mode="json"), s.on, s.tokens] for s in subjects},
        "runners": {s.name: held.installed_version(s.artifact) for s in subjects},
        "made by": [code("bluelm", "export", "targets", "eval"), tool_versions()],
    }

    def work(folder: Path) -> None:
        found = judge_artifacts(inspector, subjects, progress, reference)
        with atomic_folder(folder) as temporary:
            (temporary / "judged.json").write_bytes(JUDGED.dump_json(found, indent=1))

    folder = stages.run(layout.JUDGED, inputs, work)
    return JUDGED.validate_json(read_bytes(folder / "judged.json", MOST_TABLE_BYTES))


def judge_artifacts(
    inspector: Inspector, subjects: Sequence[Subject], progress: Progress, reference: bool = True
) -> Judged:
    """`judged` without a stage around it."""
    with progress.task("find what the weights answer in float32", total=1) as task:
        inspector.expect([(subject.artifact, subject.on) for subject in subjects])
        give_back()
        task.advance()
    with progress.task("inspect the artifacts", total=len(subjects)) as task:
        figures = []
        for subject in subjects:  # one after another: showing blocks may compile once more
            figures += inspector.files(subject.artifact, subject.name)
            shown = inspector.blocks(subject.artifact, subject.on, subject.name)
            figures += origin(subject.artifact, subject.on).mark(shown)
            figures += inspector.runner(subject.artifact, subject.name)
            give_back()  # blocks and whole models in float32: else they count as held to the end
            task.advance(note=subject.artifact.format)
    stop = threading.Event()
    float_model = None
    if reference and inspector.checkpoint is not None:
        float_model = judge.Reference(TorchRuntime(inspector.checkpoint, inspector.context))
    with ThreadPoolExecutor(len(subjects)) as pool:
        futures = [pool.submit(_judge_one, s, inspector, float_model, progress, stop) for s in subjects]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()  # the other threads end behind the window that they are at
            raise
    found = {s.name: future.result() for s, future in zip(subjects, futures, strict=True)}
    return Judged(
        (*(figure for one in found.values() for figure in one.figures), *figures),
        {name: one.documents for name, one in found.items() if one.documents is not None},
        {name: one.runtime for name, one in found.items()},
    )


def _judge_one(
    subject: Subject,
    inspector: Inspector,
    reference: judge.Reference | None,
    progress: Progress,
    stop: threading.Event,
) -> _JudgedOne:
    artifact = subject.artifact
    answered = origin(artifact, subject.on)
    with ExitStack() as stack:
        runtimes = [stack.enter_context(open_runtime(artifact.folder, on=subject.on)) for _ in range(subject.sessions)]
        told = f"{runtimes[0].name} ({structure.runtime_version(artifact)})"

        def positions(one: Runtime) -> list[Measurement]:
            return inspector.positions(artifact, subject.on, one, subject.name)

        def ending(one: Runtime) -> list[Measurement]:
            return inspector.ending(artifact, one, subject.name)

        own: list[judge.Job[list[Measurement]]] = [positions, ending]
        windows = inspector.held_out.first(subject.tokens) if reference is not None else ()
        domains = heldout.domains(windows)
        name = f"judge the {subject.name.upper()} artifact"
        found, scores = judge.score_beside(own, reference, runtimes, windows, name=name, progress=progress, stop=stop)
        figures = [figure for part in found for figure in part]
        if reference is None or scores is None:
            return _JudgedOne(answered.mark(figures), None, told)
        figures = [*judge.accuracy(scores, subject.name, domains), *figures]
        if inspector.given:
            rows = inspector.tokenizer.vocab_size
            figures.append(
                sanity.reference_to_guess(scores.reference_nll, inspector.held_out.windows, rows, subject.name)
            )
        prompts = [window.tokens.tolist()[:PROMPT_TOKENS] for window in windows[:PROMPTS]]
        length = min(GREEDY_TOKENS, artifact.context - PROMPT_TOKENS)
        if length > 0:
            agreement = float(scores.agreement.mean())
            figures.append(
                judge.first_divergence(
                    reference, runtimes, prompts, length, subject.name, agreement=agreement, progress=progress
                )
            )
        return _JudgedOne(answered.mark(figures), judge.document_sums(scores, domains), told)


def speed(subject: Subject, held_out: HeldOut, progress: Progress) -> list[Measurement]:
    """Tokens/s of an artifact on this machine, with nothing else of ours running; [] where what runs here stands in for
    the phone's runtime: its speed says nothing, and an interpreter takes minutes to show it."""
    artifact = subject.artifact
    if run_of(artifact, subject.on).stands_in:
        return []
    prompt = held_out.windows[0].tokens.tolist()[: min(artifact.chunk, artifact.context // 2)]
    with (
        progress.task("measure the speed on this machine", total=1) as task,
        open_runtime(artifact.folder, on=subject.on) as runtime,
    ):
        steps = min(32, artifact.context // 2)
        depths = (artifact.context // 2, artifact.context - steps)
        found = host_speed(runtime, prompt, decode_steps=steps, depths=depths)
        task.advance()
    return origin(artifact, subject.on).mark(found)


def sizes(artifact: Artifact, target: Target) -> list[Measurement]:
    """Bytes of the finished artifact, and what is estimated of the phone from them."""
    size = Measurement("artifact_bytes", artifact.bytes, "bytes", "measured", note=artifact.format, subject="files")
    found = [size, estimate.memory(artifact)]
    soc = estimate.chip(target.soc.name)
    return found if soc is None else [*found, *estimate.speed(artifact, soc)]


def not_known(subjects: Sequence[Subject], figures: Sequence[Measurement]) -> dict[str, list[str]]:
    """By subject, what was not checked; of the artifact that ships, also why its speed is not estimated; of the one
    whose speed this machine would show, why it does not."""
    found = {s.name: structure.not_known(s.artifact, [f for f in figures if f.subject == s.name]) for s in subjects}
    stand_in = run_of(subjects[-1].artifact, subjects[-1].on).stands_in
    if stand_in:
        found[subjects[-1].name].append(f"tokens/s on this machine: not measured here, where it runs by {stand_in}")
    shipped = subjects[0]
    found[shipped.name] += held.not_judged(shipped.artifact, [f for f in figures if f.subject == shipped.name])
    why = estimate.not_known(shipped.artifact)
    if why is not None and not any(m.subject == "soc" and m.unit == "tokens/s" for m in figures):
        found[shipped.name].append(f"{why}; the default budget's limit does not hold for it")
    return found
