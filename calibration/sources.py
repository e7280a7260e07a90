"""Reads text from users' .txt, .jsonl and .parquet files, and folders of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.text.tokenizer import Tokenizer, plain_text
from calibration.rows import json_rows, parquet_rows

BUNDLED = Path(__file__).parent / "data" / "default.jsonl"
SUFFIXES = (".txt", ".jsonl", ".parquet")
COLUMNS = ("text", "prompt", "response", "messages")
MOST_BYTES = 384 * 2**20  # a few MB calibrate any model; more than this is a mistake
SHAPES = "`text`, `prompt` and `response`, or `messages` (a list of `role` and `content`) with or without `tools`"


@dataclass(frozen=True)
class Document:
    """Plain text, or a conversation; one of the two is empty.

    Attributes:
        messages: in the shape that chat templates take: `role`, `content`, maybe `tool_calls` and more.
        tools: JSON schemas of the functions that the model could call; None without any.
        where: the file it comes from, and the line or row.
    """

    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None
    where: str = field(default="", compare=False)

    @property
    def content(self) -> str:
        """The text without roles and template."""
        return self.text or "\n".join(self.texts)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, or what each message says."""
        return tuple(plain_text(turn) for turn in self.messages) if self.messages else (self.text,)


@dataclass(frozen=True)
class TextSet:
    """Documents of one or more files.

    Attributes:
        name: what a report calls it.
        sha256: over the bytes of the files, in order.
        documents: those with any text in them.
        empty: documents that were left out because they had none.
    """

    name: str
    sha256: str
    documents: tuple[Document, ...]
    empty: int


def read_texts(paths: Sequence[Path] | None) -> TextSet:
    """Read files and folders, or the bundled set for None.

    Raises:
        InputError: a path is missing, of another kind, too large, not text, not of a known shape, or there is
            no text in all of it.
        UnavailableError: a .parquet file, and pyarrow is not installed.
    """
    files = _files(paths) if paths is not None else [BUNDLED]
    size = sum(file.stat().st_size for file in files)
    if size > MOST_BYTES:
        raise InputError(
            f"the calibration text is {size / 2**20:.0f} MiB, more than {MOST_BYTES // 2**20}",
            where=", ".join(map(str, paths or ())),
            fix="give a part of it; a few MB are enough",
        )
    digest = hashlib.sha256()
    documents: list[Document] = []
    for file in files:
        data = file.read_bytes()
        digest.update(data)
        documents.extend(_read(file, data))
    kept = tuple(document for document in documents if document.content.strip())
    name = "bundled" if paths is None else ", ".join(str(path) for path in paths)
    if not kept:
        raise InputError("there is no text in the calibration set", where=name, fix="give files with text in them")
    return TextSet(name, digest.hexdigest(), kept, len(documents) - len(kept))


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` name, folders opened, each folder's files in the order of their names."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise InputError(f"the folder has no {', '.join(SUFFIXES)} file", where=path)
            found.extend(inside)
        elif not path.is_file():
            raise InputError("there is no such file or folder of text", where=path)
        elif path.suffix.lower() not in SUFFIXES:
            raise InputError("text of an unknown kind", where=path, fix=f"give {', '.join(SUFFIXES)}")
        else:
            found.append(path)
    if not found:
        raise InputError("no calibration file was named")
    return found


def _read(file: Path, data: bytes) -> Iterable[Document]:
    match file.suffix.lower():
        case ".txt":
            return [Document(text=_decode(file, data), where=str(file))]
        case ".jsonl":
            return (document(record, where) for where, record in json_rows(_decode(file, data), file))
        case _:
            rows = parquet_rows(file, COLUMNS, MOST_BYTES)
            return (document({k: v for k, v in row.items() if v is not None}, where) for where, row in rows)


def _decode(file: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"not text in UTF-8 (byte {error.start})",
            where=file,
            fix="convert it, for example: iconv -f gb18030 -t utf-8; or omit binary files",
        ) from None
    if "\0" in text:
        raise InputError("not text: it holds zero bytes", where=file, fix="omit binary files")
    return text


def document(record: object, where: str) -> Document:
    """A record of one of the three shapes.

    Raises:
        InputError: of another; the keys that were found are named.
    """
    if not isinstance(record, dict | Mapping):  # the first is asked for quickly
        raise InputError("not a JSON object", where=where, fix=f"give {SHAPES}")
    if "messages" in record:
        messages = tuple(_turn(turn, where) for turn in _list(record, "messages", where))
        return Document(messages=messages, tools=_tools(record, where), where=where)
    if "prompt" in record and "response" in record:
        prompt, response = _string(record, "prompt", where), _string(record, "response", where)
        pair = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
        return Document(messages=pair if (prompt + response).strip() else (), where=where)
    if "text" in record:
        return Document(text=_string(record, "text", where), where=where)
    found = ", ".join(sorted(map(str, record))) or "nothing"
    raise InputError(f"no text in the record: found {found}", where=where, fix=f"give {SHAPES}")


def check_chats(documents: Iterable[Document], tokenizer: Tokenizer) -> None:
    """Make sure that the model's chat template takes every conversation.

    Raises:
        InputError: one that it refuses, with the file and the line.
    """
    for found in documents:
        if found.messages:
            try:
                tokenizer.check_chat(found.messages, tools=found.tools)
            except InputError as error:
                fix = error.fix or f"correct the line, or remove it; the template is that of {error.where}"
                raise InputError(error.problem, where=found.where, fix=fix) from None


def _turn(turn: object, where: str) -> Mapping[str, Any]:
    if not isinstance(turn, Mapping):
        raise InputError("a message must be an object with `role` and `content`", where=where)
    _string(turn, "role", where)
    content = turn.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise InputError("a part of `content` must be an object with `text`", where=where)
    elif content is not None or not turn.get("tool_calls"):
        _string(turn, "content", where)
    return {key: value for key, value in turn.items() if value is not None}


def _tools(record: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...] | None:
    if record.get("tools") is None:
        return None
    tools = _list(record, "tools", where)
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError("`tools` must be a list of JSON schemas", where=where)
    return tuple(tool for tool in tools if isinstance(tool, Mapping)) or None


def _list(record: Mapping[str, Any], key: str, where: str) -> list[object]:
    value = record[key]
    if not isinstance(value, list):
        raise InputError(f"`{key}` must be a list", where=where)
    return value


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise InputError(f"`{key}` must be text, found {type(value).__name__}", where=where)
    return value
