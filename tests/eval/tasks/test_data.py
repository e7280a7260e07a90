"""Task data from local folders: the makers' layouts are read, what is missing or damaged is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bluelm.errors import InputError
from eval.tasks.task_data import LocalData
from tests.support.files import task_files

CMMLU = {
    "task": "cmmlu_arts",
    "dataset_path": "haonan-li/cmmlu",
    "dataset_name": "arts",
    "test_split": "test",
    "fewshot_split": "dev",
}
CEVAL = {
    "task": "ceval-valid_law",
    "dataset_path": "ceval/ceval-exam",
    "dataset_name": "law",
    "validation_split": "val",
    "fewshot_split": "dev",
}
MMLU = {
    "task": "mmlu_virology",
    "dataset_path": "cais/mmlu",
    "dataset_name": "virology",
    "test_split": "test",
    "fewshot_split": "dev",
}
GSM8K = {
    "task": "gsm8k",
    "dataset_path": "openai/gsm8k",
    "dataset_name": "main",
    "test_split": "test",
    "training_split": "train",
    "fewshot_split": "train",
}
HUMANEVAL = {"task": "humaneval", "dataset_path": "openai/openai_humaneval", "test_split": "test"}


@pytest.mark.parametrize("below", ["", "cmmlu"])
def test_cmmlu(tmp_path: Path, below: str) -> None:
    task_files.cmmlu(tmp_path / below, "arts", "BD")
    data = LocalData(tmp_path)
    splits = data.splits(CMMLU)
    assert {split: len(rows) for split, rows in splits.items()} == {"dev": 5, "test": 2}
    expected = {"Question": "arts，第1题？", "A": "一", "B": "二", "C": "三", "D": "四", "Answer": "D"}
    assert splits["test"][1] == expected
    first = data.digest
    task_files.cmmlu(tmp_path / below, "arts", "BC")
    again = LocalData(tmp_path)
    again.splits(CMMLU)
    assert again.digest != first


def test_ceval_and_mmlu(tmp_path: Path) -> None:
    task_files.ceval(tmp_path / "ceval", "law", "CA")
    task_files.mmlu(tmp_path / "mmlu", "virology", "DAB")
    found = LocalData(tmp_path).splits(CEVAL)["val"]
    assert [row["answer"] for row in found] == ["C", "A"]
    assert set(found[0]) == {"question", "A", "B", "C", "D", "answer"}
    rows = LocalData(tmp_path).splits(MMLU)["test"]
    assert rows[0] == {"question": "Question 0?", "choices": ["one", "two", "three", "four"], "answer": 3}
    assert len(rows) == 3


def test_lines_packed_or_not_and_beside_one_another(tmp_path: Path) -> None:
    task_files.gsm8k(tmp_path / "text" / "gsm8k_test.jsonl", [18, 3])
    task_files.humaneval(tmp_path / "text" / "HumanEval.jsonl.gz")
    assert [row["answer"][-2:] for row in LocalData(tmp_path).splits(GSM8K)["test"]] == ["18", " 3"]
    assert "train" not in LocalData(tmp_path).splits(GSM8K)
    assert LocalData(tmp_path / "text").splits(HUMANEVAL)["test"][0]["entry_point"] == "add"


def test_parquet_as_on_the_hub(tmp_path: Path) -> None:
    rows = [{"question": "Why?", "subject": "virology", "choices": ["a", "b", "c", "d"], "answer": 2}]
    for split in ("dev", "test"):
        path = tmp_path / "virology" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = LocalData(tmp_path).splits(MMLU)
    assert found["test"] == [{"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 2}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe\xff", "cannot be read"),
        (b",Question,A,B,C,D\n0,Why?,a,b,c,d\n", "lacks Answer"),
        (b",Question,A,B,C,D,Answer\n0,Why?,a,b,c,d,E\n", "'E' is not one of A, B, C, D"),
        (b",Question,A,B,C,D,Answer\n0,Why?,a,b\n", "lacks C, D, Answer"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, told: str) -> None:
    task_files.cmmlu(tmp_path, "arts", "A")
    (tmp_path / "test" / "arts.csv").write_bytes(content)
    with pytest.raises(InputError, match=told) as caught:
        LocalData(tmp_path).splits(CMMLU)
    assert "arts.csv" in str(caught.value)


def test_a_packed_file_is_not_unpacked_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.tasks.task_data.MOST_UNPACKED", 100_000)
    task_files.humaneval(tmp_path / "HumanEval.jsonl.gz")
    assert LocalData(tmp_path).splits(HUMANEVAL)["test"]
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b" " * 100_001))
    with pytest.raises(InputError, match="unpacks to more than"):
        LocalData(tmp_path).splits(HUMANEVAL)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data for the task cmmlu_arts(.|\n)*test/arts\.csv"):
        LocalData(tmp_path).splits(CMMLU)
    with pytest.raises(InputError, match="no known local layout"):
        LocalData(tmp_path).splits({"task": "hellaswag", "dataset_path": "Rowan/hellaswag", "test_split": "test"})
    (tmp_path / "HumanEval.jsonl").write_text('{"task_id": 1}\n')
    with pytest.raises(InputError, match="lacks prompt, test, entry_point"):
        LocalData(tmp_path).splits(HUMANEVAL)
    (tmp_path / "HumanEval.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="not a record"):
        LocalData(tmp_path).splits(HUMANEVAL)
