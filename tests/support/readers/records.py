"""The readers of what runs keep for themselves (a folder may be a stranger's), and of tasks' data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from calibration.ranks import Ranks
from compress.checkpoint.work import Work
from eval.tasks.answers import Answers
from eval.tasks.task_data import LocalData
from pipeline.run.identity import check_settings
from pipeline.run.stages import RECORDS, Stages
from tests.support.files import task_files
from tests.support.readers.reader import Reader

INPUTS: Mapping[str, Any] = {
    "checkpoint": "0" * 64,
    "model": "/m",
    "recipe": {"bits": 4, "layers": {}},
    "made by": ["a", 1],
}
STAGE = "codes"


def _work(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.txt").write_text("codes")


def _stage(folder: Path) -> None:
    Stages(folder, tell=lambda text: None).run(STAGE, INPUTS, _work)


@cache
def _stage_files() -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / RECORDS).mkdir()
        _stage(folder)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _stage_reader(name: str) -> Callable[[], Reader]:
    return lambda: Reader(_stage_files(), f"{RECORDS}/{name}", _stage, mends=True)


def _unfinished(folder: Path) -> None:
    Work(folder / "q", INPUTS, Ranks()).close()


def _data(name: str, write: Callable[[Path], object], task: Mapping[str, str]) -> Callable[[], Reader]:
    """One split of a task; `name`: of the file below the folder."""

    def made() -> Reader:
        with tempfile.TemporaryDirectory() as place:
            write(Path(place))
            data = (Path(place) / name).read_bytes()
        config = {"task": "a task", "test_split": "test", **task}
        return Reader({name: data}, name, lambda folder: LocalData(folder).splits(config))

    return made


def _parquet() -> Reader:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"question": ["1 + 1?", "2 + 2?"], "answer": ["#### 2", "#### 4"]}), sink)
    name = "gsm8k/main/test-00000.parquet"
    config = {"task": "a task", "test_split": "test", "dataset_path": "openai/gsm8k", "dataset_name": "main"}
    content = {name: sink.getvalue().to_pybytes()}
    return Reader(content, name, lambda folder: LocalData(folder).splits(config))


def _answers(folder: Path) -> None:
    with Answers(folder / "float.jsonl") as kept:
        kept["d"] = -0.5


ANSWERS = b'["a", "4"]\n["b", [-1.5, true]]\n["c", [1, 2, 3]]\n["e", -2.25]\n'
READERS: dict[str, Callable[[], Reader]] = {
    "stage record": _stage_reader(f"{STAGE}.json"),
    "note of a stage": _stage_reader(f"{STAGE}.begun"),
    "settings of a run": lambda: Reader(
        {f"{RECORDS}/settings": json.dumps(dict(INPUTS)).encode()},
        f"{RECORDS}/settings",
        lambda folder: check_settings(folder, INPUTS, overwrite=False),
        mends=True,
    ),
    "inputs of an unfinished run": lambda: Reader(
        {"q.partial/inputs.json": json.dumps(dict(INPUTS)).encode(), "q.partial/block-000.safetensors": b""},
        "q.partial/inputs.json",
        _unfinished,
        mends=True,
    ),
    "answers to tasks": lambda: Reader({"float.jsonl": ANSWERS}, "float.jsonl", _answers),
    "task data csv": _data(
        "cmmlu/test/anatomy.csv",
        lambda folder: task_files.cmmlu(folder / "cmmlu", "anatomy", "ABCD"),
        {"dataset_path": "haonan-li/cmmlu", "dataset_name": "anatomy"},
    ),
    "task data without heading": _data(
        "mmlu/test/anatomy_test.csv",
        lambda folder: task_files.mmlu(folder / "mmlu", "anatomy", "ABCD"),
        {"dataset_path": "cais/mmlu", "dataset_name": "anatomy"},
    ),
    "task data jsonl": _data(
        "gsm8k/test.jsonl",
        lambda folder: task_files.gsm8k(folder / "gsm8k" / "test.jsonl", [2, 4]),
        {"dataset_path": "openai/gsm8k", "dataset_name": "main"},
    ),
    "task data gz": _data(
        "humaneval/HumanEval.jsonl.gz",
        lambda folder: task_files.humaneval(folder / "humaneval" / "HumanEval.jsonl.gz"),
        {"dataset_path": "openai/openai_humaneval"},
    ),
    "task data parquet": _parquet,
}
