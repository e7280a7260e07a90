"""Reads tasks' data from local folders, in the layouts in which they are published."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.system.files import sha256
from bluelm.system.reading import open_regular, read_bytes
from calibration.rows import MOST_TEXT, json_rows, parquet_rows

Rows = list[dict[str, Any]]
LETTERS = "ABCD"
MOST_UNPACKED = 64 * 2**20  # bytes of a .gz, a thousand times as large as the file at most


@dataclass(frozen=True)
class DataFiles:
    """Where a data set's files lie, and what its rows must hold.

    Attributes:
        folders: names of its own folder; the given folder itself is tried as well.
        files: patterns below, with {split} and {subject}; `.gz` behind them is tried as well.
        columns: that every row has. answer: the column that holds a letter A to D; "" where there is none.
        headless: columns of a CSV file without a heading.
    """

    folders: tuple[str, ...]
    files: tuple[str, ...]
    columns: tuple[str, ...]
    answer: str = ""
    headless: tuple[str, ...] = ()


# by the name on the Hugging Face hub, as the harness's tasks give it; parquet files are as on the hub
_PARQUET = ("{subject}/{split}-*.parquet", "data/{split}-*.parquet")
LAYOUTS: Mapping[str, DataFiles] = {
    "haonan-li/cmmlu": DataFiles(
        ("cmmlu", "CMMLU"), ("{split}/{subject}.csv",), ("Question", *LETTERS, "Answer"), "Answer"
    ),
    "ceval/ceval-exam": DataFiles(
        ("ceval", "ceval-exam", "C-Eval"),
        ("{split}/{subject}_{split}.csv", "{split}/{subject}.csv", *_PARQUET),
        ("question", *LETTERS, "answer"),
        "answer",
    ),
    "cais/mmlu": DataFiles(
        ("mmlu", "MMLU", "data"),
        ("{split}/{subject}_{split}.csv", *_PARQUET),
        ("question", "choices", "answer"),
        headless=("question", *LETTERS, "answer"),
    ),
    "openai/gsm8k": DataFiles(
        ("gsm8k", "GSM8K", "grade_school_math/data"),
        ("{split}.jsonl", "gsm8k_{split}.jsonl", "*/gsm8k_{split}.jsonl", *_PARQUET),
        ("question", "answer"),
    ),
    "openai/openai_humaneval": DataFiles(
        ("humaneval", "HumanEval", "openai_humaneval"),
        ("HumanEval.jsonl", "*/HumanEval.jsonl", "openai_humaneval/{split}-*.parquet", "{split}-*.parquet"),
        ("task_id", "prompt", "test", "entry_point"),
    ),
}


@dataclass
class LocalData:
    """Splits read from a folder, and a digest over the files that they came from."""

    folder: Path
    files: dict[str, str] = field(default_factory=dict)

    def splits(self, config: Mapping[str, Any]) -> dict[str, Rows]:
        """Rows by split of one task of the harness; a split without a file is left out.

        Args:
            config: the task's: dataset_path, dataset_name and the names of its splits.

        Raises:
            InputError: no known layout, no file of the split that is asked, a file that does not hold what it should.
        """
        layout = LAYOUTS.get(str(config.get("dataset_path")))
        if layout is None:
            raise InputError(
                f"the data of the task {config['task']} have no known local layout",
                where=self.folder,
                fix=f"known are {', '.join(LAYOUTS)}; omit --task-data to fetch others from the hub",
            )
        asked = config.get("test_split") or config.get("validation_split")
        wanted = {str(s) for s in (asked, config.get("fewshot_split"), config.get("training_split")) if s}
        subject = str(config.get("dataset_name") or "")
        found = {split: rows for split in sorted(wanted) if (rows := self._split(layout, split, subject))}
        if asked not in found:
            tried = ", ".join(pattern.format(split=asked, subject=subject) for pattern in layout.files)
            raise InputError(
                f"there is no data for the task {config['task']}",
                where=self.folder,
                fix=f"one of {tried} must lie there, or below {' or '.join(layout.folders)}",
            )
        return found

    @property
    def digest(self) -> str:
        """SHA-256 over the names and bytes of all files read."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    def _split(self, layout: DataFiles, split: str, subject: str) -> Rows:
        paths = next(_candidates(self.folder, layout, split, subject), [])
        rows: Rows = []
        for path in paths:
            self.files[str(path.relative_to(self.folder))] = _digest(path)
            rows += [_checked(row, layout, path, number) for number, row in enumerate(_read(path, layout), start=1)]
        return rows


def _digest(path: Path) -> str:
    size = path.stat().st_size
    if size > MOST_TEXT:
        problem = f"the task's data have {size} bytes, more than {MOST_TEXT >> 20} MiB"
        raise InputError(problem, where=path, fix="fetch the file again")
    return sha256(path)


def _candidates(folder: Path, layout: DataFiles, split: str, subject: str) -> Iterator[list[Path]]:
    for place in (*(folder / name for name in layout.folders), folder):
        for pattern in layout.files:
            for ending in ("", ".gz"):
                name = pattern.format(split=split, subject=subject or "main") + ending
                paths = sorted(path for path in place.glob(name) if path.is_file()) if place.is_dir() else []
                if paths:
                    yield paths


def _read(path: Path, layout: DataFiles) -> Rows:
    """Rows of a .csv, .jsonl or .parquet file, packed by gzip or not."""
    try:
        if path.suffix == ".parquet":
            return [row for _, row in parquet_rows(path)]
        data = _unpacked(path) if path.suffix == ".gz" else read_bytes(path, MOST_TEXT)
        text = data.decode("utf-8-sig")
        if ".jsonl" in path.name:
            return [row for _, row in json_rows(text, path)]
        lines = [line for line in csv.reader(io.StringIO(text, newline="")) if line]
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise InputError(f"the task's data cannot be read: {error}", where=path, fix="fetch the file again") from error
    heading = list(layout.headless)
    if lines and (not heading or [cell.strip().lower() for cell in lines[0]] == [h.lower() for h in heading]):
        heading, lines = [cell.strip() for cell in lines[0]], lines[1:]
    return [dict(zip(heading, line, strict=False)) for line in lines]


def _unpacked(path: Path) -> bytes:
    """A .gz file's content, which may be thousands of times as large as the file."""
    with open_regular(path) as file, gzip.open(file) as packed:
        data = packed.read(MOST_UNPACKED + 1)
    if len(data) > MOST_UNPACKED:
        raise ValueError(f"it unpacks to more than {MOST_UNPACKED >> 20} MiB")
    return data


def _checked(row: Any, layout: DataFiles, path: Path, number: int) -> dict[str, Any]:
    """The row as the harness's task takes it."""
    where = f"{path}, row {number}"
    if not isinstance(row, dict):
        raise InputError("the row is not a record", where=where)
    if layout.headless and all(letter in row for letter in LETTERS):
        letter = str(row.get("answer")).strip()
        answer = LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS else None
        row = {"question": row.get("question"), "choices": [row[letter] for letter in LETTERS], "answer": answer}
    lacking = [column for column in layout.columns if row.get(column) is None]
    if lacking:
        raise InputError(f"the row lacks {', '.join(lacking)}", where=where, fix=f"needed: {', '.join(layout.columns)}")
    kept = {column: row[column] for column in layout.columns}
    if layout.answer:
        kept[layout.answer] = str(kept[layout.answer]).strip()
        if kept[layout.answer] not in tuple(LETTERS):
            raise InputError(f"the answer {kept[layout.answer]!r} is not one of A, B, C, D", where=where)
    return kept
