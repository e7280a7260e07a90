"""Tokens that a checkpoint adds to its tokenizer's own pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.system.files import member
from bluelm.system.reading import read_json

MAX_ID = 2**24
# THUDM's ChatGLMTokenizer puts these behind the pieces of tokenizer.model, in this order (tokenization_chatglm.py)
CHATGLM_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
MOST_TOKENS, MOST_CHARACTERS = 10_000, 1000  # a pattern is made of them


@dataclass(frozen=True)
class AddedToken:
    """Text that is always one token; `lstrip` and `rstrip` let it swallow the white space beside it."""

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False


def optional_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder, or {} where there is none."""
    return read_json(member(folder, name)) if (folder / name).exists() else {}


def read_added_tokens(folder: Path) -> list[AddedToken]:
    """From added_tokens.json (text -> id) and tokenizer_config.json's added_tokens_decoder (id -> token).

    Raises:
        InputError: a value that is not as these files have it, or one id or text that is given twice.
    """
    where = folder / "added_tokens.json"
    found = [
        _token(text, {"content": text}, number, where) for text, number in optional_json(folder, where.name).items()
    ]
    where = folder / "tokenizer_config.json"
    decoder = optional_json(folder, where.name).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InputError("added_tokens_decoder must be an object", where=where)
    for key, token in decoder.items():
        number = int(key) if key.isdecimal() and len(key) < 10 else None
        found.append(_token(key, token, number, where))
    texts: dict[str, AddedToken] = {}
    ids: dict[int, str] = {}
    for token in found:  # the decoder knows more about a token and comes last
        if texts.get(token.text, token).id != token.id or ids.get(token.id, token.text) != token.text:
            raise InputError(f"added token {token.text!r} (id {token.id}) is given twice, differently", where=folder)
        texts[token.text], ids[token.id] = token, token.text
    if len(texts) > MOST_TOKENS:
        problem = f"{len(texts)} added tokens: more than {MOST_TOKENS}"
        raise InputError(problem, where=folder, fix="fetch the files again")
    return sorted(texts.values(), key=lambda token: token.id)


def _token(name: str, token: Any, number: Any, where: Path) -> AddedToken:
    text = token.get("content") if isinstance(token, dict) else None
    good_id = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < MAX_ID
    if not isinstance(text, str) or not 0 < len(text) <= MOST_CHARACTERS or not good_id:
        problem = f"added token {name[:60]!r} must have a text and an id"
        raise InputError(problem, where=where, fix="fetch the file again")
    return AddedToken(text, number, token.get("lstrip") is True, token.get("rstrip") is True)


def chatglm_tokens(pieces: int, added: Sequence[AddedToken]) -> list[AddedToken]:
    """The tokens that ChatGLM's class adds behind `pieces` pieces, where the folder's files do not name them."""
    known = {token.text for token in added}
    return [AddedToken(text, pieces + index) for index, text in enumerate(CHATGLM_TOKENS) if text not in known]


def token_text(token: object) -> str | None:
    """The text of a token as tokenizer_config.json writes one: plain, or an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def splitter(tokens: Sequence[AddedToken]) -> re.Pattern[str] | None:
    """A pattern that finds the tokens, the longest first; its last group is the text. None without tokens."""
    if not tokens:
        return None
    longest_first = sorted(tokens, key=lambda token: (-len(token.text), token.text))
    space = r"\s*"
    return re.compile(
        "|".join(
            f"{space * t.lstrip}(?P<t{i}>{re.escape(t.text)}){space * t.rstrip}" for i, t in enumerate(longest_first)
        )
    )
