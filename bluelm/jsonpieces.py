"""Text to pieces and back with the `tokenizers` library, from tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bluelm.added_tokens import optional_json, token_text
from bluelm.errors import InputError, UnavailableError
from bluelm.files import read_json
from bluelm.sentencepieces import SentencePieces

if TYPE_CHECKING:
    import tokenizers


class JsonPieces:
    """The pieces of a tokenizer.json; the same surface as `SentencePieces`."""

    def __init__(self, path: Path) -> None:
        """Read `path`, and bos, eos and pad from the tokenizer_config.json beside it.

        Raises:
            UnavailableError: the `tokenizers` library is not installed.
            InputError: not a tokenizer.json.
        """
        try:
            import tokenizers
        except ImportError:
            raise UnavailableError(
                "tokenizer.json needs the `tokenizers` library",
                where=path,
                fix='pip install "bluelm-export[tokenizers]"',
            ) from None
        data = read_json(path)
        self._trusting = _build(tokenizers, data, path)
        added = self._trusting.get_added_tokens_decoder()
        self._marks = [token.content for token in added.values() if token.special]
        self._plain = _build(tokenizers, data, path)
        self._plain.encode_special_tokens = True  # special tokens in the text are text
        self.size = max(self._trusting.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = optional_json(path.parent, "special_tokens_map.json")
        named |= optional_json(path.parent, "tokenizer_config.json")
        self.bos, self.eos, self.pad = (self._named(named.get(f"{name}_token")) for name in ("bos", "eos", "pad"))

    def _named(self, token: object) -> int | None:
        text = token_text(token)
        return None if text is None else self.id(text)

    def front(self) -> tuple[int, ...]:
        """The tokens that the file's post-processor puts in front of a text; it alone decides in transformers."""
        with_it, plain = (self._trusting.encode("a", add_special_tokens=special).ids for special in (True, False))
        places = (at for at in range(len(with_it)) if with_it[at : at + len(plain)] == plain)
        return tuple(with_it[: next(places, 0)])

    def id(self, text: str) -> int | None:
        """The token that is exactly `text`."""
        return self._trusting.token_to_id(text)

    def has_marks(self, text: str) -> bool:
        """True when trusted and untrusted encoding of `text` could differ."""
        return any(mark in text for mark in self._marks)

    def encode(self, text: str, trusted: bool, behind_mark: bool = False) -> list[int]:
        """Tokens of `text`; special tokens in it become their token only when it is trusted."""
        del behind_mark  # the file's own pre-tokenizer decides about prefixes
        tokenizer = self._trusting if trusted else self._plain
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens left out."""
        return self._trusting.decode(list(tokens), skip_special_tokens=True)

    def stream(self, continues: bool) -> JsonStream:
        """A decoder that takes one token at a time."""
        del continues
        return JsonStream(self._trusting)


class JsonStream:
    """Text of tokens as they come; a UTF-8 character is held back until its last byte is there."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._told = ""

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._told += text
        return text

    def flush(self) -> str:
        """What is left when the tokens ended inside a character."""
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)[len(self._told) :]


def same_tokens(path: Path, pieces: SentencePieces) -> bool:
    """Whether a tokenizer.json and a tokenizer.model with its added tokens have the same texts by id."""
    data = read_json(path)
    model = data.get("model")
    table = model.get("vocab") if isinstance(model, dict) else None
    found: dict[object, object] = {}
    if isinstance(table, dict):  # BPE
        found = {index: text for text, index in table.items() if isinstance(index, int)}
    elif isinstance(table, list):  # Unigram: [text, score]
        found = {index: row[0] if isinstance(row, list) and row else row for index, row in enumerate(table)}
    added = data.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            found[token["id"]] = token.get("content")
    return found == pieces.texts()


def _build(library: Any, data: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    try:
        return library.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception for a malformed file
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"not a tokenizer.json: {reason}", where=path, fix="fetch the file again") from error
