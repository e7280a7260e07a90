"""Reads text records from .jsonl and .parquet files, one by one and within bounds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bluelm.errors import InputError, UnavailableError
from bluelm.system.reading import parse_json
from bluelm.text.unicode import whole_characters

MOST_TEXT = 384 * 2**20  # bytes of text in one file; a packed file may hold thousands of times its own size
BATCH_BYTES = 2**24  # of a parquet file read at a time, and 16 rows at least
BATCH_ROWS = (16, 4096)


def json_rows(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line of JSON that is not blank.

    A line ends at a line feed alone: JSON may hold U+2028, U+0085 and the like unescaped in its strings (RFC 8259,
    section 7), where `str.splitlines` would cut it.

    Raises:
        InputError: a line is not JSON, or holds half of a surrogate pair.
    """
    start, number, place = 0, 0, str(file)
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line, start, number = text[start:end], end + 1, number + 1
        if not line.strip():
            continue
        where = f"{place}, line {number}"
        try:
            value = parse_json(line, where)
        except InputError as error:
            problem = error.problem.replace("not readable as JSON", "not JSON")
            raise InputError(problem, where=where, fix="one JSON object a line") from None
        if "\\" in line and "\\ud" in line.lower():
            whole_characters(json.dumps(value, ensure_ascii=False), where)
        yield where, value


def parquet_rows(file: Path, wanted: Sequence[str] | None = None, most: int = MOST_TEXT) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row, as a dict of the `wanted` columns that the table has (None: all).

    Args:
        most: characters that the rows may have, and bytes that a group of them may take unpacked.

    Raises:
        InputError: it cannot be read, has none of the columns, or unpacks to more than `most`.
        UnavailableError: pyarrow is not installed.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        fix = "pip install 'bluelm-export[parquet]', or give .jsonl"
        raise UnavailableError("reading .parquet needs pyarrow", where=file, fix=fix) from None
    size = number = 0
    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if wanted is None or name in wanted]
        declared = _largest_group(table.metadata)
        _check_size(declared, most, file)
        rows = min(max(BATCH_BYTES // max(declared, 1), BATCH_ROWS[0]), BATCH_ROWS[1])
        for batch in table.iter_batches(batch_size=rows, columns=columns, use_threads=False) if columns else ():
            for row in batch.to_pylist():
                size += _length(row)
                _check_size(size, most, file)
                yield f"{file}, row {number}", row
                number += 1
    except (arrow.ArrowException, OSError, RuntimeError, ValueError, LookupError, ArithmeticError) as error:
        # what Cython makes of C++ exceptions; UnicodeDecodeError: its strings are checked as they are read
        raise InputError(f"not a readable .parquet file: {error}", where=file) from None
    if not columns:
        raise InputError("the table has none of the columns that are known", where=file)


def _largest_group(metadata: Any) -> int:
    """Bytes of the largest row group, unpacked but for its dictionaries; no value in it is larger.

    Columns are not asked: of one whose statistics are damaged pyarrow ends the process (std::terminate).
    """
    return max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)


def _length(value: Any) -> int:
    """Characters of all text in a row."""
    if isinstance(value, dict | list):
        return sum(map(_length, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 0


def _check_size(size: int, most: int, file: Path) -> None:
    if size > most:
        raise InputError(
            f"it unpacks to more than {most / 2**20:.0f} MiB of text",
            where=file,
            fix="give a part of it; a few MB are enough",
        )
