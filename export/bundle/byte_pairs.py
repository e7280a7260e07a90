"""Whether the Kotlin app's own tokenizer (`BytePairs.kt`) reads a tokenizer.json as Hugging Face's library does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_WHO = "the app's own tokenizer"


def unread(table: Mapping[str, Any]) -> str | None:
    """Why it does not; None where it does.

    Args:
        table: of tokenizer.json.
    """
    return next(_faults(table), None)


def _faults(table: Mapping[str, Any]) -> Iterator[str]:
    model = table.get("model") or {}
    if model.get("type") != "BPE":
        yield f"{_WHO} reads byte-level BPE, and this model's pieces are {model.get('type')}"
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            yield f"{_WHO} does not know {name} of tokenizer.json"
    normalizer = table.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        yield f"{_WHO} does not change text as {normalizer.get('type')} does"
    parts = list(_parts(table.get("pre_tokenizer")))
    if not any(part.get("type") == "ByteLevel" for part in parts):
        yield f"{_WHO} reads byte-level BPE, and this model's text is not cut into bytes"
    for part in parts:
        if not _known(part):
            yield f"{_WHO} does not cut text as {part.get('type')} of tokenizer.json does"
    for token in table.get("added_tokens") or ():
        if any(token.get(name) for name in ("single_word", "lstrip", "rstrip")):
            yield f"{_WHO} does not find {token.get('content')!r} as tokenizer.json says"


def _parts(cuts: Any) -> Iterator[Mapping[str, Any]]:
    """Of a pre-tokenizer, in their order."""
    if isinstance(cuts, dict) and cuts.get("type") == "Sequence":
        for part in cuts.get("pretokenizers") or ():
            yield from _parts(part)
    elif isinstance(cuts, dict):
        yield cuts


def _known(part: Mapping[str, Any]) -> bool:
    match part:
        case {"type": "Split", "pattern": {"Regex": str()}, "behavior": "Isolated", "invert": False}:
            return True
        case {"type": "Digits", "individual_digits": True}:
            return True
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return True
        case _:
            return False
