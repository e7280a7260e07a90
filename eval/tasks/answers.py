"""Answers to a task's questions, kept as lines of JSON, so that a broken-off run asks none of them twice.

A folder may be a stranger's: lines of text run no code and hide no views, and each value is checked when it is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from bluelm.errors import InputError
from bluelm.system.reading import parse_json, read_bytes
from calibration.rows import MOST_TEXT

Answer = str | float | tuple[int | float, ...]
"""A text, a log-likelihood (and whether it was the likeliest), or counts."""
BEGUN = b'["'  # a line, and what a kill may leave of one
FIX = "remove the file: its questions are asked again"


class Answers:
    """A table of answers by the digest of their question, as the harness's cache wants one; each is kept at once."""

    def __init__(self, path: Path) -> None:
        """Read what lies there; a line that a kill tore is cut off.

        Raises:
            InputError: it holds something else, or cannot be read.
        """
        self.path = path
        self._found: dict[str, Answer] = {}
        whole = self._read() if os.path.lexists(path) else 0
        self._file = path.open("ab")
        self._file.truncate(whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, question: str) -> bool:
        return question in self._found

    def __getitem__(self, question: str) -> Answer:
        return self._found[question]

    def __setitem__(self, question: str, answer: Answer) -> None:
        self._found[question] = answer
        self._file.write(json.dumps([question, answer]).encode() + b"\n")
        self._file.flush()

    def counts(self, name: str) -> tuple[int, int, int]:
        """Three counts that are kept beside the answers; zeros where there are none.

        Raises:
            InputError: an answer stands in their place.
        """
        match self._found.get(name, (0, 0, 0)):
            case (int(first), int(second), int(third)):
                return first, second, third
        raise InputError("a count that is kept beside the answers cannot be read", where=self.path, fix=FIX)

    def __len__(self) -> int:
        return len(self._found)

    def commit(self) -> None:
        """For the harness; every answer is kept when it comes."""

    def close(self) -> None:
        self._file.close()

    def _read(self) -> int:
        """Bytes of whole lines."""
        data = read_bytes(self.path, MOST_TEXT, "the file of kept answers")
        whole = data.rfind(b"\n") + 1
        if data[whole:][:2] not in (b"", BEGUN[:1], BEGUN):  # nothing is cut off that is no line of ours
            raise InputError("a line that is none of an answer's ends the file", where=self.path, fix=FIX)
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            question, answer = _entry(line, f"{self.path}, line {number}")
            self._found[question] = answer
        return whole


def _entry(line: bytes, where: str) -> tuple[str, Answer]:
    try:
        told: Any = parse_json(line.decode(), where)
    except UnicodeDecodeError:
        told = None
    match told:
        case [str(question), str() | float() as answer]:
            return question, answer
        case [str(question), [float(), bool()] | [int(), int(), int()] as answer]:
            return question, tuple(answer)
    raise InputError("an answer that is kept cannot be read", where=where, fix=FIX)
