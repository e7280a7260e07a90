"""Reads settings from untrusted JSON files within bounds; for YAML see `bluelm/system/yamlfiles.py`.

Only a regular file is opened (a pipe would block for ever), and only up to a size. Its content may be neither too deep
nor too large: numbers of thousands of digits, deep nesting and aliases that multiply are refused on reading, so that
later code need not check again.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bluelm.errors import InputError

if TYPE_CHECKING:
    from pydantic import ValidationError

MOST_BYTES = 16 << 20  # of a file of settings; the largest that are known have a fraction of it
MOST_TABLE_BYTES = 64 << 20  # of a tokenizer or an index of tensors
MOST_RECORD_PARTS = 100_000  # values of a file that pydantic checks: it makes an error of each that is wrong
MOST_PARTS = 4 << 20  # values in one JSON file: some 250 MB in memory
MOST_DEPTH = 64
_MORE = 1 << 20  # that a file may have grown; room is taken for all that is asked for
MOST_DIGITS = 40  # of a whole number: transformers writes a tokenizer without a limit as int(1e30)


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading that is neither pipe nor device.

    Raises:
        InputError: it is one, or a folder.
        OSError: it is missing or may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError("this is not a regular file", where=path, fix="give a file that lies on a disk")
    return os.fdopen(descriptor, "rb")


def check_regular(path: Path) -> Path:
    """The path itself, for a library that opens it: at a pipe that would wait for ever. Others tell what is missing.

    Raises:
        InputError: a pipe, a device or a folder lies there.
    """
    if path.exists() and not path.is_file():
        raise InputError("this is not a regular file", where=path, fix="give a file that lies on a disk")
    return path


def read_bytes(path: Path, most: int = MOST_BYTES, what: str = "the file") -> bytes:
    """All bytes of a regular file; `what` is what messages call it.

    Raises:
        InputError: it is larger than `most`, no regular file, missing, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(most, size + _MORE) + 1) if size <= most else b""
    except OSError as error:
        fix = "see that it is there and may be read"
        raise InputError(f"{what} cannot be read: {error.strerror or error}", where=path, fix=fix) from None
    except ValueError as error:  # a zero byte in its name
        raise InputError(f"{what} cannot be read: {error}", where=repr(str(path))) from None
    if size > most or len(data) > most:
        problem = f"{what} has more than {most} bytes"
        fix = "see whether it is the right file, or fetch it again"
        raise InputError(f"{problem}: {max(size, len(data))}", where=path, fix=fix)
    return data


def read_text(path: Path, most: int = MOST_BYTES, what: str = "the file") -> str:
    """All text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: as `read_bytes`, or it is no UTF-8.
    """
    try:
        return read_bytes(path, most, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{what} cannot be read: not UTF-8 (byte {error.start})"
        raise InputError(problem, where=path, fix="write it in UTF-8") from None


def read_record(path: Path, most: int = MOST_BYTES, what: str = "the file") -> str:
    """Text of a JSON file whose values are checked one by one.

    Raises:
        InputError: as `read_text`, or it has more than `MOST_RECORD_PARTS` values.
    """
    return check_record(read_text(path, most, what), path, what)


def check_record(text: str, where: object, what: str = "the file") -> str:
    """The text itself; raises InputError if it has more than `MOST_RECORD_PARTS` values."""
    if _parts(text) > MOST_RECORD_PARTS:
        raise InputError(f"{what} has more than {MOST_RECORD_PARTS} values", where=where, fix="fetch it again")
    return text


def _parts(text: str) -> int:
    return text.count(",") + text.count("[") + text.count("{")


def first_fault(error: ValidationError) -> str:
    """What pydantic found first, and where in the file."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"


def read_note(path: Path) -> str:
    """A line that we wrote for ourselves, a digest say; "" where there is none, or something else."""
    try:
        return read_text(path, 1000).strip()
    except InputError:
        return ""


def read_json(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: the file cannot be read or is not a JSON object in UTF-8.
    """
    data = parse_json(read_text(path, most), path)
    if not isinstance(data, dict):
        raise InputError(f"expected a JSON object, found {type(data).__name__}", where=path)
    return data


def parse_json(text: str, where: object) -> Any:
    """A JSON value.

    Raises:
        InputError: it is none, has more than `MOST_PARTS` values, is deeper than `MOST_DEPTH`, or holds a whole
            number of more than `MOST_DIGITS` digits.
    """
    try:
        brackets = text.count("[") + text.count("{")
        if brackets + text.count(",") > MOST_PARTS:
            raise ValueError(f"more than {MOST_PARTS} values")
        data = _DECODER.decode(text)
        if brackets > MOST_DEPTH:
            _check_depth(data)
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"not readable as JSON: {reason}", where=where, fix="fetch the file again") from None
    return data


def walk(data: Any, most: int) -> Iterator[Any]:
    """Every value and every key, shared ones as often as they are met.

    Raises:
        ValueError: too deep, too many, or a whole number that is too long.
    """
    waiting = [(data, 0)]
    count = 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > most:
            raise ValueError(f"more than {most} values")
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} nested brackets")
        if isinstance(value, int) and not -(10**MOST_DIGITS) < value < 10**MOST_DIGITS:
            raise ValueError(f"a whole number of more than {MOST_DIGITS} digits")
        yield value
        if isinstance(value, Mapping):
            waiting += [(key, depth + 1) for key in value]
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += [(inner, depth + 1) for inner in value]


def _check_depth(data: Any) -> None:
    """ValueError where brackets stand too deep in one another; in a JSON value, which shares nothing."""
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(MOST_DEPTH + 1):
        insides = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in insides for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(f"more than {MOST_DEPTH} nested brackets")


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_whole)
