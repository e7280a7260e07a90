"""Encodes and decodes text with the `tokenizers` library, from tokenizer.json."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bluelm.errors import InputError, UnavailableError
from bluelm.system.files import write_text
from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.added_tokens import AddedToken, optional_json, splitter, token_text
from bluelm.text.guard import Part
from bluelm.text.sentencepieces import SentencePieces

if TYPE_CHECKING:
    import tokenizers

SAVED = ("truncation", "padding")  # what whoever saved the file last had asked for, not the model
SECONDS, CHARACTERS_PER_SECOND = 10.0, 20_000  # a tenth of what the slowest tokenizer reaches
MOST_GROWTH = 1000
ALIASES = 0xF0000  # private use: characters that stand for trusted marks
ANOTHER = "take the tokenizer.json of the original checkpoint"


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
        data = read_settings(path)
        _check(data, path)
        self._path, self._has_patterns = path, _has_pattern(data)
        self._trusting, self._data = _build(tokenizers, data, path), data
        added = self._trusting.get_added_tokens_decoder()
        self._special = [token for token in added.values() if token.special]
        self.marks = splitter([_as_added(token) for token in self._special if token.content])
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
        with_it, plain = (self._ids(self._trusting, "a", special) for special in (True, False))
        places = (at for at in range(len(with_it)) if with_it[at : at + len(plain)] == plain)
        return tuple(with_it[: next(places, 0)])

    def special(self) -> tuple[str, ...]:
        """Texts of the special tokens: what `marks` finds."""
        return tuple(sorted({token.content for token in self._special if token.content}))

    def id(self, text: str) -> int | None:
        """The token that is exactly `text`."""
        return self._trusting.token_to_id(text)

    def text(self, token: int) -> str | None:
        """The text that is exactly this token."""
        return self._trusting.id_to_token(token)

    def encode(self, text: str, trusted: bool) -> list[int]:
        """Tokens of `text`; special tokens in it become their token only when it is trusted."""
        tokenizer = self._trusting if trusted else self._plain
        return self._ids(tokenizer, text, False)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Tokens of one text whose marks are trusted in some of its parts, and data in others (`guard.parts`)."""
        tokenizer, stands_for = self._aliased
        alias = {token.content: chr(ALIASES + number) for number, token in enumerate(self._special)}

        def aliased(text: str) -> str:
            return self.marks.sub(lambda match: alias[match[match.lastgroup or 0]], text) if self.marks else text

        text = "".join(part if data else aliased(part) for part, data in parts)
        return [stands_for.get(token, token) for token in self._ids(tokenizer, text, False)]

    @cached_property
    def _aliased(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer to which special tokens are text and characters of private use are the special tokens; its ids
        of those, and what they stand for."""
        import tokenizers

        made = _build(tokenizers, self._data, self._path)
        made.encode_special_tokens = True
        names = [chr(ALIASES + number) for number in range(len(self._special))]
        made.add_tokens(
            [
                tokenizers.AddedToken(name, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                for name, token in zip(names, self._special, strict=True)
            ]
        )
        pairs = zip(names, self._special, strict=True)
        ids = ((made.token_to_id(name), self.id(token.content)) for name, token in pairs)
        return made, {alias: own for alias, own in ids if alias is not None and own is not None}

    def _ids(self, tokenizer: tokenizers.Tokenizer, text: str, special: bool) -> list[int]:
        """Tokens of `text`, with a limit of time where the file brings regular expressions of its own.

        Raises:
            InputError: they take longer, or the library gives up.
        """

        def work() -> list[int]:  # of `encode` and `encode_batch`, the second lets other threads run
            return list(tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)

        with _told(f"a text of {len(text)} characters", self._path):
            if not self._has_patterns:
                return list(tokenizer.encode(text, add_special_tokens=special).ids)
            return _in_time(work, SECONDS + len(text) / CHARACTERS_PER_SECOND)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens left out."""
        with _told(f"{len(tokens)} tokens", self._path):
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


def _as_added(token: Any) -> AddedToken:
    """Without what it swallows beside it: the tokenizer itself sees to that."""
    return AddedToken(token.content, 0)


def read_settings(path: Path) -> dict[str, Any]:
    """A tokenizer.json, without the truncation and padding that somebody saved with it: they are no rule of the model.

    Raises:
        InputError: it cannot be read.
    """
    return read_json(path, MOST_TABLE_BYTES) | dict.fromkeys(SAVED)


def copy_settings(path: Path, to: Path) -> None:
    """Copy a tokenizer.json, its truncation and padding switched off; byte for byte where they are off already."""
    data = read_json(path, MOST_TABLE_BYTES)
    if any(data.get(name) is not None for name in SAVED):
        write_text(to, json.dumps(data | dict.fromkeys(SAVED), ensure_ascii=False, indent=2))
    else:
        shutil.copyfile(path, to)


def same_tokens(path: Path, pieces: SentencePieces) -> bool:
    """Whether a tokenizer.json and a tokenizer.model with its added tokens have the same texts by id."""
    data = read_settings(path)
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


def _nodes(data: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a JSON value."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _has_pattern(data: dict[str, Any]) -> bool:
    return any("Regex" in node for part in (data.get("normalizer"), data.get("pre_tokenizer")) for node in _nodes(part))


def _check(data: dict[str, Any], path: Path) -> None:
    """InputError where single characters may become thousands, or text is made by patterns whose time has no limit."""
    growth = 1
    for node in (node for part in ("normalizer", "pre_tokenizer", "decoder") for node in _nodes(data.get(part))):
        text = node.get("content")
        growth *= max(1, len(text)) if isinstance(text, str) else 1
        if growth > MOST_GROWTH:
            raise InputError(f"a character may become more than {MOST_GROWTH}", where=path, fix=ANOTHER)
    if any("Regex" in node for node in _nodes(data.get("decoder"))):
        raise InputError("the decoder holds a regular expression", where=path, fix="write it as plain text")


def _in_time(work: Callable[[], list[int]], seconds: float) -> list[int]:
    """What `work` returns, from a thread that is left behind where it takes longer: nothing can stop it.

    Raises:
        TimeoutError: it does. What `work` raises.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns of every fork behind this
    found: list[list[int]] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001  (raised again below)
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise TimeoutError(f"it takes more than {seconds:.0f} s")
    return found[0]


def _build(library: Any, data: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    with _told("this file", path):
        return library.Tokenizer.from_str(json.dumps(data))


@contextmanager
def _told(what: str, path: Path) -> Iterator[None]:
    """What the library raises, bare Exceptions and Rust's panics (which are none), as an InputError.

    Args:
        what: it is given.
    """
    try:
        yield
    except (KeyboardInterrupt, MemoryError, SystemExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the tokenizer fails on {what}: {reason}", where=path, fix=ANOTHER) from None
