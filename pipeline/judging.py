"""Judges the artifacts of a run: accuracy side by side, speed alone on the machine, sizes."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import TypeAdapter

from bluelm.checkpoint import Checkpoint
from bluelm.files import atomic_folder
from bluelm.progress import Progress
from eval import estimate, judge
from eval.heldout import HeldOut, Window
from eval.measurement import Measurement
from eval.report import tool_versions
from eval.speed import host_speed
from export.artifact import Artifact
from pipeline import layout
from pipeline.stages import Stages, code
from targets.runtime import Place, open_runtime
from targets.target import Target
from targets.torch_runtime import TorchRuntime

DECODED = 8  # tokens that prefill-then-decode decodes one by one
FIGURES = TypeAdapter(tuple[Measurement, ...])


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


def room_for_reference(checkpoint: Checkpoint) -> str | None:
    """None, or why the float model cannot be held beside the artifacts here."""
    weights = 4 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    available = psutil.virtual_memory().available
    if weights < 0.9 * available:
        return None
    return (
        f"accuracy was not measured: the float32 model takes {weights / 1e9:.1f} GB of memory, "
        f"{available / 1e9:.1f} GB are available"
    )


def accuracy(
    checkpoint: Checkpoint, subjects: Sequence[Subject], held_out: HeldOut, stages: Stages, progress: Progress
) -> list[Measurement]:
    """Figures of every artifact against the float model on the same windows, all artifacts at once."""
    inputs: dict[str, Any] = {
        "checkpoint": checkpoint.digest(),
        "text": [held_out.digest, held_out.length],
        "subjects": {s.name: [s.artifact.model_dump(mode="json"), s.on, s.tokens] for s in subjects},
        "made by": [code("bluelm", "targets", "eval"), tool_versions()],
    }

    def work(folder: Path) -> None:
        figures = _accuracy(checkpoint, subjects, held_out, progress)
        with atomic_folder(folder) as temporary:
            (temporary / "figures.json").write_bytes(FIGURES.dump_json(tuple(figures), indent=1))

    folder = stages.run(layout.JUDGED, inputs, work)
    return list(FIGURES.validate_json((folder / "figures.json").read_bytes()))


def _accuracy(
    checkpoint: Checkpoint, subjects: Sequence[Subject], held_out: HeldOut, progress: Progress
) -> list[Measurement]:
    context = min(subject.artifact.context for subject in subjects)
    reference = judge.Reference(TorchRuntime(checkpoint, context))
    stop = threading.Event()
    with ThreadPoolExecutor(len(subjects)) as pool:
        futures = [
            pool.submit(_judge_one, subject, reference, held_out.first(subject.tokens), progress, stop)
            for subject in subjects
        ]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()  # the other threads end behind the window that they are at
            raise
    return [figure for future in futures for figure in future.result()]


def _judge_one(
    subject: Subject,
    reference: judge.Reference,
    windows: Sequence[Window],
    progress: Progress,
    stop: threading.Event,
) -> list[Measurement]:
    with ExitStack() as stack:
        runtimes = [
            stack.enter_context(open_runtime(subject.artifact.folder, on=subject.on)) for _ in range(subject.sessions)
        ]
        name = f"judge the {subject.name.upper()} artifact"
        scores = judge.score(reference, runtimes, windows, name=name, progress=progress, stop=stop)
        figures = judge.accuracy(scores, subject.name)
        longest = max(windows, key=lambda window: len(window.tokens))
        tokens = longest.tokens.tolist()[: subject.artifact.chunk + DECODED // 2]
        steps = min(DECODED, len(tokens) - 1)
        figures += judge.prefill_decode(runtimes[0], tokens, steps, subject.name)
    return figures


def speed(subject: Subject, held_out: HeldOut, progress: Progress) -> list[Measurement]:
    """Tokens/s of an artifact on this machine, with nothing else of ours running."""
    artifact = subject.artifact
    prompt = held_out.windows[0].tokens.tolist()[: min(artifact.chunk, artifact.context // 2)]
    with (
        progress.task("measure the speed on this machine", total=1) as task,
        open_runtime(artifact.folder, on=subject.on) as runtime,
    ):
        steps = min(32, artifact.context // 2)
        depths = (artifact.context // 2, artifact.context - steps)
        found = host_speed(runtime, prompt, decode_steps=steps, depths=depths)
        task.advance()
    return found


def sizes(artifact: Artifact, target: Target) -> list[Measurement]:
    """Bytes of the finished artifact, and what is estimated of the phone from them."""
    size = Measurement("artifact_bytes", artifact.bytes, "bytes", "measured", note=artifact.format, subject="files")
    found = [size, estimate.memory(artifact)]
    soc = estimate.chip(target.soc.name)
    if soc is not None:
        on_npu = artifact.format == "qnn-context"
        found += estimate.speed(artifact, soc, "npu" if on_npu else "cpu", "QNN" if on_npu else "")
    return found
