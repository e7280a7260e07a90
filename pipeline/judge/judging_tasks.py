"""Runs tasks of lm-evaluation-harness on the float model and the artifact; answers are cached on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress
from bluelm.system.reading import read_bytes
from bluelm.text.tokenizer import Tokenizer
from eval.files.origin import origin
from eval.measurement import Measurement
from eval.report import tool_versions
from eval.tasks import tasks
from eval.tasks.answers import Answers
from eval.tasks.tasks import Scores, TaskSet
from pipeline.judge.judging import Subject
from pipeline.run import layout
from pipeline.run.stages import PARTIAL, Stages, code
from targets.host.generation import ends
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import Runtime, open_runtime

FIGURES = TypeAdapter(tuple[Measurement, ...])


def judge_tasks(
    asked: TaskSet, checkpoint: Checkpoint, subject: Subject, stages: Stages, progress: Progress, *, reference: bool
) -> list[Measurement]:
    """Scores, the float model's beside them, and recovery.

    Args:
        subject: the artifact that ships. reference: whether there is room for the float model.
    """
    request = asked.request
    inputs: dict[str, Any] = {
        "checkpoint": checkpoint.digest() if reference else None,
        "artifact": [subject.artifact.model_dump(mode="json"), subject.on],
        "tasks": [asked.members, request.limit, request.shots, asked.data],
        "made by": [code("bluelm", "targets", "eval"), tool_versions(), _harness_version()],
    }

    def work(folder: Path) -> None:
        answers = folder.with_name(f"{folder.name}{PARTIAL}")
        answers.mkdir(exist_ok=True)
        figures = _ask_both(asked, checkpoint if reference else None, subject, answers, progress)
        with atomic_folder(folder) as temporary:
            (temporary / "figures.json").write_bytes(FIGURES.dump_json(tuple(figures), indent=1))
        _clear(answers)
        answers.rmdir()

    folder = stages.run(layout.TASKS, inputs, work, _clear)
    return list(FIGURES.validate_json(read_bytes(folder / "figures.json")))


def _clear(answers: Path) -> None:
    """Remove the answers of an unfinished run.

    Raises:
        InputError: something else lies among them.
    """
    ours = {*answers.glob("*.jsonl")}
    foreign = sorted(path.name for path in set(answers.iterdir()) - ours)
    if foreign:
        problem = f"among the answers lies what no run of ours wrote: {', '.join(foreign[:3])}"
        raise InputError(problem, where=answers, fix="move it elsewhere")
    for path in ours:
        path.unlink()


def _ask_both(
    asked: TaskSet, checkpoint: Checkpoint | None, subject: Subject, answers: Path, progress: Progress
) -> list[Measurement]:
    tokenizer = Tokenizer.from_folder(subject.artifact.folder)
    stop = ends(tokenizer, subject.artifact)
    expected = None
    if checkpoint is not None:
        with TorchRuntime(checkpoint, subject.artifact.context) as runtime:
            path = answers / "float.jsonl"
            expected, _ = _ask(asked, runtime, tokenizer, stop, "the float model", path, progress)
    with open_runtime(subject.artifact.folder, on=subject.on) as runtime:
        name, path = f"the {subject.name.upper()} artifact", answers / f"{subject.name}.jsonl"
        scores, note = _ask(asked, runtime, tokenizer, stop, name, path, progress)
    return origin(subject.artifact, subject.on).mark(tasks.compare(asked, expected, scores, subject.name, note))


def _ask(
    asked: TaskSet, runtime: Runtime, tokenizer: Tokenizer, stop: set[int], name: str, path: Path, progress: Progress
) -> tuple[Scores, str]:
    """All questions to one model. Every answer goes into `path` at once, so that a broken-off run can go on."""
    from eval.tasks.harness_model import HarnessModel

    model = HarnessModel(runtime, tokenizer, stop, name, progress)
    with Answers(path) as kept:
        return tasks.ask(asked, _keeping(model, kept)), model.note


def _keeping(model: Any, kept: Answers) -> Any:
    """The model behind the library's cache, with answers kept as ours: the library's own are pickles.

    It behaves as a model of the library.
    """
    from lm_eval.api.model import CachingLM

    class Keeping(CachingLM):
        def __init__(self) -> None:
            self.lm, self.cache_db, self.dbdict = model, str(kept.path), kept
            model.set_cache_hook(self.get_cache_hook())

    return Keeping()


def _harness_version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
