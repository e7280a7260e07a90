"""Small files in the layouts of CMMLU, C-Eval, MMLU, GSM8K and HumanEval, with questions of our own."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

HEADING = ",Question,A,B,C,D,Answer"
PROGRAMS = {
    "add": ("def add(a, b):\n    # the sum\n", "assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0"),
    "double": ("def double(a):\n    # twice a\n", "assert candidate(2) == 4"),
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def cmmlu(folder: Path, subject: str, answers: str) -> None:
    """CMMLU's layout: a numbered CSV file with a heading for each split."""
    for split, letters in (("dev", "ABCDA"), ("test", answers)):
        rows = [f'{i},"{subject}，第{i}题？",一,二,三,四,{letter}' for i, letter in enumerate(letters)]
        write(folder / split / f"{subject}.csv", "\n".join([HEADING, *rows]) + "\n")


def ceval(folder: Path, subject: str, answers: str) -> None:
    """C-Eval's layout."""
    for split, letters in (("dev", "ABCDA"), ("val", answers)):
        rows = [f"{i},第{i}题,一,二,三,四,{letter},因为" for i, letter in enumerate(letters)]
        text = "\n".join(["id,question,A,B,C,D,answer,explanation", *rows])
        write(folder / split / f"{subject}_{split}.csv", text + "\n")


def mmlu(folder: Path, subject: str, answers: str) -> None:
    """MMLU's layout: no heading."""
    for split, letters in (("dev", "ABCDA"), ("test", answers)):
        rows = [f"Question {i}?,one,two,three,four,{letter}" for i, letter in enumerate(letters)]
        write(folder / split / f"{subject}_{split}.csv", "\n".join(rows) + "\n")


def lines(path: Path, records: Iterable[dict[str, str]]) -> None:
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def gsm8k(path: Path, results: Iterable[int]) -> None:
    records = [{"question": f"What is {r} and 0?", "answer": f"It is <<{r}+0={r}>>{r}.\n#### {r}"} for r in results]
    lines(path, records)


def humaneval(path: Path) -> None:
    records = [
        {
            "task_id": f"own/{name}",
            "prompt": prompt,
            "entry_point": name,
            "canonical_solution": "",
            "test": f"def check(candidate):\n    {test}\n",
        }
        for name, (prompt, test) in PROGRAMS.items()
    ]
    lines(path, records)
