"""Held-out text, cut to windows of tokens that every runtime is judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bluelm.errors import InputError
from bluelm.system.files import sha256
from bluelm.text.tokenizer import Tokenizer
from calibration.describe import in_languages, model_languages
from calibration.rows import json_rows
from calibration.sources import Document, check_chats, document, read_texts

BUNDLED = Path(__file__).parent / "data" / "heldout.jsonl"
LENGTH = 256


@dataclass(frozen=True)
class Window:
    """Tokens that are judged together.

    Attributes:
        tokens: int64 [n]. Documents that share a window each begin with the token that begins a text.
        judged: bool [n], which of them count: all but those beginnings, which nothing announces.
        domain: what the text is: zh, en, code, math, or the name of the user's file.
        documents: int64 [n], number of the document that each token stands in, over all domains.
    """

    tokens: NDArray[np.int64]
    judged: NDArray[np.bool_]
    domain: str
    documents: NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Windows in an order whose every beginning holds the domains in their shares of the whole.

    Attributes:
        source: the files' names. digest: SHA-256 over their bytes, or over the documents that were taken of the
            bundled set. length: most tokens of a window.
        judged: tokens that count, by domain. documents: how many there are, by domain.
        texts: the documents, chats as their contents. notes: what a user should know of the choice.
    """

    windows: tuple[Window, ...]
    source: str
    digest: str
    length: int
    texts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> Mapping[str, int]:
        count: dict[str, int] = {}
        for window in self.windows:
            count[window.domain] = count.get(window.domain, 0) + int(window.judged[1:].sum())
        return count

    @property
    def documents(self) -> Mapping[str, int]:
        found: dict[str, set[int]] = {}
        for window in self.windows:
            found.setdefault(window.domain, set()).update(window.documents[window.judged].tolist())
        return {domain: len(numbers) for domain, numbers in found.items()}

    def first(self, tokens: int) -> tuple[Window, ...]:
        """The fewest windows from the front in which so many tokens count; all if there are fewer."""
        taken, count = [], 0
        for window in self.windows:
            if count >= tokens:
                break
            taken.append(window)
            count += int(window.judged[1:].sum())
        return tuple(taken)


def domains(windows: Sequence[Window]) -> dict[int, str]:
    """The domain of each document that stands in the windows."""
    return {number: window.domain for window in windows for number in np.unique(window.documents).tolist()}


def load(paths: Sequence[Path], tokenizer: Tokenizer, *, length: int = LENGTH, seed: int = 0) -> HeldOut:
    """The bundled set, or the user's texts, as windows of at most `length` tokens.

    Of the bundled set, documents are left out in a language that the model was not made for. Documents of a domain
    follow one another until a window is full; the last, shorter one is kept if it holds at least half of the length
    (or is the only one).

    Raises:
        InputError: a file that is missing or cannot be read, a chat that the template refuses, or texts of fewer
            than two tokens.
    """
    texts, source, digest, notes = _read(paths, tokenizer)
    generator = np.random.default_rng(seed)
    by_domain: dict[str, list[Window]] = {}
    first = 0
    for name in sorted(texts):
        check_chats(texts[name], tokenizer)
        by_domain[name] = pack(texts[name], name, tokenizer, length, first)
        first += len(texts[name])
    windows = spread({n: [w[i] for i in generator.permutation(len(w))] for n, w in by_domain.items()})
    if not windows:
        raise InputError("the text to judge on is too short", where=source, fix="give some sentences")
    contents = tuple(text for found in texts.values() for one in found for text in one.texts)
    return HeldOut(tuple(windows), source, digest, length, contents, notes)


def _read(paths: Sequence[Path], tokenizer: Tokenizer) -> tuple[dict[str, list[Document]], str, str, tuple[str, ...]]:
    """Documents by domain, the source's name, its digest, and what to tell of it."""
    if not paths:
        return _bundled(model_languages(tokenizer))
    domains: dict[str, list[Document]] = {}
    texts = [read_texts([path]) for path in paths]
    for path, found in zip(paths, texts, strict=True):
        domains.setdefault(path.stem, []).extend(found.documents)
    digest = hashlib.sha256("".join(found.sha256 for found in texts).encode()).hexdigest()
    return domains, ", ".join(str(path) for path in paths), digest, ()


def _bundled(languages: tuple[str, ...]) -> tuple[dict[str, list[Document]], str, str, tuple[str, ...]]:
    rows = list(json_rows(BUNDLED.read_text(encoding="utf-8"), BUNDLED))
    documents = [document(record, where) for where, record in rows]
    chosen = in_languages([found.content for found in documents], languages, "the text to judge on")
    domains: dict[str, list[Document]] = {}
    for index in chosen.kept:
        domains.setdefault(rows[index][1]["domain"], []).append(documents[index])
    digest = sha256(BUNDLED)
    if len(chosen.kept) < len(rows):
        digest = hashlib.sha256(f"{digest} {chosen.kept}".encode()).hexdigest()
    return domains, chosen.name, digest, chosen.notes


def pack(documents: Sequence[Document], domain: str, tokenizer: Tokenizer, length: int, first: int = 0) -> list[Window]:
    """Windows of `length` tokens of documents that follow one another, the first of them with the number `first`."""
    tokens: list[int] = []
    judged: list[bool] = []
    numbers: list[int] = []
    windows: list[Window] = []

    def close() -> None:
        windows.append(
            Window(np.array(tokens, dtype=np.int64), np.array(judged), domain, np.array(numbers, dtype=np.int64))
        )
        for column in (tokens, judged, numbers):
            column.clear()

    for number, found in enumerate(documents, first):
        begin, encoded = _encode(found, tokenizer)
        start = 0
        while start < len(encoded):
            if len(tokens) + len(begin) + 1 > length:
                close()
            piece = encoded[start : start + length - len(tokens) - len(begin)]
            start += len(piece)
            tokens += begin + piece
            judged += [False] * len(begin) + [bool(begin)] + [True] * (len(piece) - 1)
            numbers += [number] * (len(begin) + len(piece))
    if len(tokens) >= length / 2 or (not windows and len(tokens) >= 2):
        close()
    return windows


def _encode(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that begin a document, none for a chat whose template writes none, and the rest."""
    front = list(tokenizer.front)
    if not document.messages:
        return front, tokenizer.encode(document.text)
    tokens = tokenizer.chat(document.messages, tools=document.tools)
    return (front, tokens[len(front) :]) if tokens[: len(front)] == front else ([], tokens)


def spread(groups: Mapping[str, Sequence[Window]]) -> list[Window]:
    """Merge the groups so that each is spread evenly over the whole."""
    placed = [
        ((i + 0.5) / len(windows), name, window) for name, windows in groups.items() for i, window in enumerate(windows)
    ]
    return [window for _, _, window in sorted(placed, key=lambda p: p[:2])]
