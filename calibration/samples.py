"""Token windows for calibration, and the report on what they were made of."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bluelm.errors import InputError
from bluelm.text.tokenizer import NO_TEMPLATE, Tokenizer
from calibration.describe import in_languages, model_languages, shares, warnings
from calibration.sources import Document, TextSet, check_chats, read_texts

PASSAGE = 8  # longer texts are cut into so many characters a token of the window: windows come from many


@dataclass(frozen=True)
class CalibrationReport:
    """What a model was calibrated with.

    Attributes:
        name: "bundled", which of its languages were left out, or the paths that were given.
        sha256: over the bytes of the set's files.
        documents: how many were used, whole or in part; empty: how many were left out for having no text.
        windows, length, tokens: windows, tokens in each, and both multiplied.
        seed: of the choice.
        chinese, english, code: shares of the used text by bytes of letters.
        chat: share of the used tokens that stand in the model's chat template.
        warnings: what the set lacks.
    """

    name: str
    sha256: str
    documents: int
    empty: int
    windows: int
    length: int
    tokens: int
    seed: int
    chinese: float
    english: float
    code: float
    chat: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a report; the shares to four digits."""
        values = asdict(self) | {"warnings": list(self.warnings)}
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


@dataclass(frozen=True)
class Samples:
    """Calibration windows: tokens int64 [n, length]."""

    tokens: Tensor
    report: CalibrationReport


@dataclass(frozen=True)
class _Passage:
    """Tokens of one passage, begun as the model's own tokenizer begins a text."""

    tokens: list[int]
    document: int
    text: str
    chat: bool


def load_samples(paths: Sequence[Path] | None, tokenizer: Tokenizer, count: int, length: int, seed: int) -> Samples:
    """At most `count` windows of `length` tokens from files, or from the bundled set for None.

    Of the bundled set, text is left out in a language that the model was not made for.

    Passages are shuffled by the seed and laid end to end; every window begins as a model's input does, mostly with
    bos. A set too small for `count` windows gives fewer, one too small for a single window a shorter one; the report
    warns of both.

    Raises:
        InputError: see `read_texts` and `check_chats`; or the set is shorter than two tokens.
    """
    if count < 1 or length < 2:
        raise InputError(f"cannot make {count} windows of {length} tokens", fix="at least 1 window of 2 tokens")
    texts, notes = read_texts(paths), tuple[str, ...]()
    if paths is None:
        chosen = in_languages([d.content for d in texts.documents], model_languages(tokenizer), "the calibration text")
        texts = replace(texts, name=chosen.name, documents=tuple(texts.documents[i] for i in chosen.kept))
        notes = chosen.notes
    check_chats(texts.documents, tokenizer)
    used = _passages(texts, tokenizer, count * length, length, seed)
    windows = _windows([token for passage in used for token in passage.tokens], count, length, tokenizer.front)
    if len(windows[0]) < 2:
        raise InputError(
            "the calibration text is shorter than a token",
            where=texts.name,
            fix=f"give at least a window of {length} tokens",
        )
    report = _report(texts, used, windows, count, length, seed, tokenizer, notes)
    return Samples(torch.tensor(windows, dtype=torch.int64), report)


def _passages(texts: TextSet, tokenizer: Tokenizer, wanted: int, length: int, seed: int) -> list[_Passage]:
    """Passages in shuffled order until there are `wanted` tokens."""
    pieces = [(i, piece) for i, document in enumerate(texts.documents) for piece in _cut(document, PASSAGE * length)]
    random.Random(seed).shuffle(pieces)
    passages: list[_Passage] = []
    total = 0
    for index, piece in pieces:
        if total >= wanted:
            break
        if piece.messages:
            tokens = tokenizer.chat(piece.messages, tools=piece.tools)
        else:
            tokens = tokenizer.encode(piece.text, bos=True)
        passages.append(_Passage(tokens, index, piece.content, bool(piece.messages)))
        total += len(tokens)
    return passages


def _cut(document: Document, most: int) -> Iterator[Document]:
    """Plain text in passages of at most `most` characters, cut at a line's end; conversations whole."""
    if document.messages:
        yield document
        return
    text, start = document.text, 0
    while len(text) - start > most:
        end = text.rfind("\n", start + most // 2, start + most) + 1 or start + most
        yield Document(text=text[start:end])
        start = end
    if text[start:].strip():
        yield Document(text=text[start:])


def _windows(stream: list[int], count: int, length: int, begin: Sequence[int]) -> list[list[int]]:
    """Windows of `length` tokens, each with `begin` in front; a single shorter one if that is all there is."""
    windows: list[list[int]] = []
    start = 0
    while len(windows) < count and start < len(stream):
        front = list(begin) if stream[start : start + len(begin)] != list(begin) else []
        window = front + stream[start : start + length - len(front)]
        if len(window) < length and windows:
            break
        windows.append(window)
        start += max(1, length - len(front))
    return windows


def _report(
    texts: TextSet,
    used: list[_Passage],
    windows: list[list[int]],
    count: int,
    length: int,
    seed: int,
    tokenizer: Tokenizer,
    notes: tuple[str, ...],
) -> CalibrationReport:
    found = shares(passage.text for passage in used)
    chat = sum(len(p.tokens) for p in used if p.chat) / sum(len(p.tokens) for p in used)
    lines = [*notes, *warnings(found, chat, model_languages(tokenizer))]
    if chat and tokenizer.template is None:
        lines.append(f"{NO_TEMPLATE}: so are the calibration set's conversations")
        chat = 0.0
    if len(windows) < count or len(windows[0]) < length:
        lines.append(
            f"the calibration set has text for {len(windows)} windows of {len(windows[0])} tokens; "
            f"{count} of {length} were asked for"
        )
    return CalibrationReport(
        name=texts.name,
        sha256=texts.sha256,
        documents=len({passage.document for passage in used}),
        empty=texts.empty,
        windows=len(windows),
        length=len(windows[0]),
        tokens=len(windows) * len(windows[0]),
        seed=seed,
        chinese=found.chinese,
        english=found.english,
        code=found.code,
        chat=chat,
        warnings=tuple(lines),
    )
