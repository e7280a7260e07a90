"""Runs tasks of lm-evaluation-harness (extra `tasks`) on the float model and an artifact: scores and recovery."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bluelm.errors import InputError, UnavailableError
from eval.accuracy import metrics
from eval.measurement import Measurement
from eval.tasks.run_code import passes
from eval.tasks.task_data import LocalData

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

USUAL = ("cmmlu", "ceval", "mmlu/default", "gsm8k", "humaneval")  # folders of the harness that are looked at first
SEED = 1234  # the harness's own, of few-shot examples
CODE_TASKS = {"humaneval": None, "humaneval_instruct": "```"}  # tasks whose answers are run: what ends a program


@dataclass(frozen=True)
class TaskRequest:
    """What the user asked for.

    Attributes:
        names: of the harness's tasks and groups. data: folder to take their data from; None: the Hugging Face hub.
        limit: questions of each task. shots: examples before a question; None: as the task has it.
        run_code: programs that the model writes may be run.
    """

    names: tuple[str, ...]
    data: Path | None = None
    limit: int | None = None
    shots: int | None = None
    run_code: bool = False


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their data, ready to be asked.

    Attributes:
        request: what was asked for. tasks: single tasks by name. members: requested name -> its single tasks.
        data: what decides the questions: a digest of local files, or fingerprints of the hub's.
        notes: by requested name, what a reader should know.
    """

    request: TaskRequest
    tasks: dict[str, Task]
    members: dict[str, tuple[str, ...]]
    data: str
    notes: dict[str, str] = field(default_factory=dict)


Scores = dict[str, tuple[float, ...]]
"""A score a question, in the questions' order, by what is scored: a task, or a task and its way to read answers."""


def load(request: TaskRequest) -> TaskSet:
    """Find the tasks and their data.

    Raises:
        InputError: an unknown task, missing or damaged local data, or a task that runs code without leave to.
        UnavailableError: the hub cannot be reached.
        ModuleNotFoundError: the extra `tasks` is not installed.
    """
    import datasets
    from lm_eval.api import model, task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module in (model, task):  # its bars would tear ours
        setattr(module, "tqdm", partial(module.tqdm, disable=True))  # noqa: B010
    manager = _manager(request.names)
    members = {name: tuple(_single(manager, name)) for name in request.names}
    leaves = list(dict.fromkeys(leaf for found in members.values() for leaf in found))
    _check_code(manager, leaves, request.run_code)
    local = LocalData(request.data) if request.data is not None else None
    if local is not None and not local.folder.is_dir():
        raise InputError("there is no such folder of task data", where=local.folder)
    tasks, notes = {}, {}
    for leaf in leaves:
        tasks[leaf], note = _build(manager, leaf, local)
        notes |= {name: note for name, found in members.items() if note and leaf in found}
        if request.shots is not None and tasks[leaf].config.num_fewshot != 0:  # 0: a task that takes none
            tasks[leaf].set_config("num_fewshot", request.shots)
    data = local.digest if local is not None else ",".join(t.eval_docs._fingerprint for t in tasks.values())
    return TaskSet(request, tasks, members, data, notes)


def _manager(names: Sequence[str]) -> TaskManager:
    """An index of the usual tasks, read in a second; of all, in half a minute, where others are asked for."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    usual = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / name for name in USUAL])
    if all(name in usual.task_index for name in names):
        return usual
    manager = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, usual.all_tasks, n=3) or ["cmmlu", "ceval-valid", "mmlu"]
            raise InputError(f"the harness has no task {name!r}", fix=f"did you mean {', '.join(near)}?")
    return manager


def _single(manager: TaskManager, name: str) -> Iterator[str]:
    """The single tasks of a group or tag; a single task's own name."""
    entry = manager.task_index[name]
    inside: Any = (entry.cfg or {}).get("task")
    if isinstance(inside, list):
        for item in inside:
            yield from _single(manager, item if isinstance(item, str) else item.get("task") or item["group"])
    elif entry.tags and entry.cfg is None:
        for item in sorted(entry.tags):
            yield from _single(manager, item)
    else:
        yield name


def _check_code(manager: TaskManager, leaves: Sequence[str], allowed: bool) -> None:
    for leaf in leaves:
        if not (manager.task_index[leaf].cfg or {}).get("unsafe_code"):
            continue
        if leaf not in CODE_TASKS:
            known = ", ".join(CODE_TASKS)
            raise InputError(f"the task {leaf} runs code in a way that is not supported", fix=f"supported: {known}")
        if not allowed:
            fix = "add --run-code: answers run in a process with limits on time and memory, but with your network"
            raise InputError(f"the task {leaf} runs programs that the model writes", fix=fix)


def _build(manager: TaskManager, leaf: str, local: LocalData | None) -> tuple[Task, str]:
    """The task with its data, and a note where it departs from the harness's."""
    from lm_eval.api.task import ConfigurableTask

    config: dict[str, Any] = deepcopy(manager.task_index[leaf].cfg or {})
    changes, note = _local(config, local) if local is not None else ({}, "")
    try:
        if leaf in CODE_TASKS:  # the harness's own way to run code is not even imported
            config |= changes | _code(CODE_TASKS[leaf])
            return ConfigurableTask(config={k: v for k, v in config.items() if k != "tag"}), note
        spec = {"group": "asked", "task": [{"task": leaf, **changes}]} if changes else leaf
        (task,) = manager.load([spec])["tasks"].values()
    except OSError as error:
        fix = "check the network, or give --task-data a folder that holds them"
        raise UnavailableError(f"the data of the task {leaf} cannot be fetched: {error}", fix=fix) from error
    return task, note


def _local(config: Mapping[str, Any], local: LocalData) -> tuple[dict[str, Any], str]:
    """Changes of a task's configuration that make it take local rows."""
    from datasets import Dataset

    splits = {split: Dataset.from_list(rows) for split, rows in local.splits(config).items()}
    changes: dict[str, Any] = {"custom_dataset": lambda **_: splits}
    if config.get("training_split") not in splits:
        changes["training_split"] = None
    shots = config.get("fewshot_split")
    if shots is None or shots in splits:
        return changes, ""
    asked = config.get("test_split") or config.get("validation_split")
    return {**changes, "fewshot_split": asked}, f"examples come from the other questions: no {shots} set lies there"


def _code(end: str | None) -> dict[str, Any]:
    """The part of a task's configuration that reads and runs programs."""

    def programs(answers: list[list[str]], docs: Sequence[Mapping[str, str]]) -> list[list[str]]:
        cut = [[a.partition(end)[0] if end else a for a in found] for found in answers]
        return [[doc["prompt"] + a for a in found] for found, doc in zip(cut, docs, strict=True)]

    def pass_at_1(references: list[str], predictions: list[list[str]]) -> dict[str, float]:
        ran = [passes(f"{p}\n{test}") for test, found in zip(references, predictions, strict=True) for p in found]
        return {"pass@1": float(np.mean(ran))}

    return {
        "metric_list": [{"metric": pass_at_1, "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": programs}]}],
    }


def ask(tasks: TaskSet, model: LM) -> Scores:
    """Put all questions to a model; the same questions and examples to every model.

    Raises:
        InputError: a task whose score is not one number a question, the higher the better.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks.tasks.values():
        task.set_fewshot_seed(SEED)
    answers = evaluate(
        lm=model,
        task_dict={"tasks": tasks.tasks},
        limit=tasks.request.limit,
        bootstrap_iters=0,
        confirm_run_unsafe_code=tasks.request.run_code,
    )
    assert answers is not None
    assert "samples" in answers
    return dict(_scores(tasks, answers["samples"]))


def _scores(tasks: TaskSet, samples: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, tuple[float, ...]]]:
    for name, leaves in tasks.members.items():
        by_reading: dict[str, list[float]] = {}
        for leaf in leaves:
            for sample in sorted(samples[leaf], key=lambda sample: sample["doc_id"]):
                metric = sample["metrics"][0]
                value = sample[metric]
                better: Any = tasks.tasks[leaf].higher_is_better()
                if not isinstance(value, int | float | np.number) or not better[metric]:
                    raise InputError(f"the task {leaf} has no score a question that recovery can be told from")
                by_reading.setdefault(sample["filter"], []).append(float(value))
        for reading, values in by_reading.items():
            yield (name if len(by_reading) == 1 else f"{name}, {reading}"), tuple(values)


def compare(tasks: TaskSet, reference: Scores | None, scores: Scores, subject: str, note: str) -> list[Measurement]:
    """Scores and, beside the float model's, the share that the artifact recovers, each with its standard error.

    Recovery r is the ratio of the two means; its error is that of a ratio of paired means (delta method): with
    d_i = a_i - r f_i over the questions i, se(r) = se(mean of d) / mean of f. Where no answer differs, so that this is
    zero, it is what one that does would make of it: 1 / (n mean of f).

    Args:
        reference: of the float model; None where it was not asked. note: about the prompts.
    """
    found = []
    for name, values in scores.items():
        given = tasks.notes.get(name.partition(",")[0], "")
        about = "; ".join(part for part in (_about(tasks, name), given, note) if part)
        found.append(_measured("task_score", name, values, subject, about))
        if reference is None:
            continue
        found.append(_measured("task_reference", name, reference[name], subject))
        expected = float(np.mean(reference[name]))
        if expected > 0:
            ratio = float(np.mean(values)) / expected
            apart = np.array(values) - ratio * np.array(reference[name])
            error = metrics.mean(apart, np.arange(len(apart))).error
            error = None if error is None else (error or 1 / len(apart)) / expected
            found.append(
                Measurement(f"task_recovery@{name}", ratio, "", "measured", error, len(values), subject=subject)
            )
    return found


def _measured(kind: str, name: str, values: Sequence[float], subject: str, note: str = "") -> Measurement:
    estimate = metrics.mean(np.array(values), np.arange(len(values)))
    return Measurement(f"{kind}@{name}", estimate.value, "", "measured", estimate.error, len(values), note, subject)


def _about(tasks: TaskSet, name: str) -> str:
    leaves = tasks.members[name.partition(",")[0]]
    shots = {tasks.tasks[leaf].config.num_fewshot or 0 for leaf in leaves}
    few = f"{min(shots)}-shot" if len(shots) == 1 else f"{min(shots)}- to {max(shots)}-shot"
    limit = tasks.request.limit
    return f"{few}{'' if limit is None else f', the first {limit} questions of each task'}"
