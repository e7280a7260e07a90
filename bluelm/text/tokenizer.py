"""The tokenizer of a checkpoint folder, and BlueLM's chat template.

Text is data unless it is said to be trusted. A user's text that contains `[|AI|]:` or `</s>` literally is
spelled out in ordinary pieces: it reads the same, but cannot end a turn or speak for somebody else.
`encode(..., marks=True)` is for text that carries the template already; marks then count as in transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bluelm.errors import InputError
from bluelm.system.files import member
from bluelm.text.added_tokens import optional_json, read_added_tokens
from bluelm.text.jsonpieces import JsonPieces, copy_settings, same_tokens
from bluelm.text.sentencepieces import SentencePieces, piece_count
from bluelm.text.templates import Template, chatglm_tokens, find_template

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
TURNS = {
    "system": "[|SYSTEM|]:",
    "user": "[|Human|]:",
    "assistant": "[|AI|]:",
    "function": "[|Function|]:",
}


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is system, user, assistant or function (what a tool returned)."""

    role: str
    content: str


class StreamDecoder(Protocol):
    """Text of generated tokens as they come, never a part of a UTF-8 character."""

    def push(self, token: int, /) -> str:
        """The text that this token completes, maybe none."""
        ...

    def flush(self) -> str:
        """The rest, when no token follows."""
        ...


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        bos, eos, pad: token ids, None where the tokenizer and config.json know none.
        front: what the model's own tokenizer puts in front of a text: mostly bos, nothing for a Qwen2, even where
            config.json names a bos, `[gMASK] sop` for a ChatGLM.
        template: of another model's chats; None for BlueLM's.
    """

    pieces: SentencePieces | JsonPieces
    bos: int | None
    eos: int | None
    pad: int | None
    source: Path
    template: Template | None = None
    front: tuple[int, ...] = ()

    @staticmethod
    def from_folder(folder: Path | str) -> Tokenizer:
        """From tokenizer.model (with added_tokens.json and tokenizer_config.json) or from tokenizer.json.

        Where both are there and differ in a token, the one that transformers takes: tokenizer.json, unless the
        checkpoint names a class of its own that reads tokenizer.model.

        Raises:
            InputError: neither is there, or a file is damaged.
            UnavailableError: tokenizer.json without the `tokenizers` library.
        """
        folder = Path(folder)
        settings = optional_json(folder, "tokenizer_config.json")
        config = optional_json(folder, "config.json")
        pieces, path = _pieces(folder, settings, config)
        bos, eos, pad = (
            _first_id(config.get(f"{name}_token_id")) if found is None else found
            for name, found in (("bos", pieces.bos), ("eos", pieces.eos), ("pad", pieces.pad))
        )
        front = pieces.front() if isinstance(pieces, JsonPieces) else _front(pieces, settings, config)
        blue = all(pieces.id(TURNS[role]) is not None for role in ("user", "assistant"))
        return Tokenizer(pieces, bos, eos, pad, path, find_template(pieces, blue), front)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.pieces.size

    @property
    def chat_marks(self) -> bool:
        """True when `[|Human|]:` and `[|AI|]:` are single tokens; else the template is spelled out."""
        return self.pieces.id(TURNS["user"]) is not None and self.pieces.id(TURNS["assistant"]) is not None

    def encode(self, text: str, bos: bool = False, marks: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            bos: put in front what the model's own tokenizer puts there, `front`.
            marks: the text is trusted: marks in it (`[|Human|]:`, `</s>`, added tokens) become their token.
        """
        return self._begin(bos) + self.pieces.encode(text, trusted=marks)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; control tokens and ids without a piece give none."""
        return self.pieces.decode(tokens)

    def stream(self, continues: bool = False) -> StreamDecoder:
        """A decoder of generated tokens; `continues`: they continue a text, so leading white space counts."""
        return self.pieces.stream(continues)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, bos in front: `[|SYSTEM|]:…[|Human|]:…[|AI|]:…</s>[|Human|]:…[|AI|]:`.

        Ends with `[|AI|]:` for the model to answer, or behind the `</s>` of a last answer. Contents are data.

        Raises:
            InputError: no messages, an unknown role, or a system message that is not the first.
        """
        self.check_roles([message.role for message in messages])
        if self.template is not None:
            return self.template.encode(self.pieces, [(message.role, message.content) for message in messages])
        tokens, turns = self._begin(True), []
        for message in messages:
            turns.append((TURNS[message.role], message.content))
            if message.role == "assistant":
                tokens += self._turns(turns) + self._end()
                turns = []
        return tokens + self._turns([*turns, (TURNS["assistant"], "")] if turns else [])

    def check_roles(self, roles: Sequence[str]) -> None:
        """Make sure that the template holds a chat of these roles.

        Raises:
            InputError: no messages, a role that it lacks, or a system message that is not the first.
        """
        if not roles:
            raise InputError("a chat needs at least one message")
        known = TURNS if self.template is None else self.template.turns
        for index, role in enumerate(roles):
            late = role == "system" and index > 0 and self.template is None
            if role not in known or late:
                place = " that is not the first message" if late else ""
                raise InputError(f"unknown role {role!r}{place}", fix=f"known roles: {', '.join(known)}")

    def check_rows(self, rows: int) -> None:
        """Make sure that an embedding of `rows` rows fits.

        More rows than tokens are padding; fewer are an error, and so is a tokenizer for under half of them.

        Raises:
            InputError: it does not fit.
        """
        if rows < self.vocab_size or rows > 2 * self.vocab_size:
            raise InputError(
                f"the tokenizer has {self.vocab_size} tokens, the embedding {rows} rows",
                where=self.source,
                fix="use the tokenizer that belongs to these weights",
            )

    def _begin(self, wanted: bool) -> list[int]:
        return list(self.front) if wanted else []

    def _end(self) -> list[int]:
        if self.eos is None:
            raise InputError("the tokenizer has no end token", where=self.source, fix="set eos_token_id in config.json")
        return [self.eos]

    def _turns(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Tokens of turns without an end between them."""
        if not any(self.pieces.has_marks(content) for _, content in turns):
            return self.pieces.encode("".join(mark + content for mark, content in turns), trusted=True)
        tokens: list[int] = []
        for index, (mark, content) in enumerate(turns):
            tokens += self.pieces.encode(mark, trusted=True, behind_mark=index > 0)
            tokens += self.pieces.encode(content, trusted=False, behind_mark=True)
        return tokens


def copy_files(folder: Path, to: Path) -> None:
    """Copy the files of a folder's tokenizer, without truncation and padding that were saved with it.

    Raises:
        InputError: tokenizer.json cannot be read.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            copy = copy_settings if name == "tokenizer.json" else shutil.copyfile
            copy(folder / name, to / name)


def _pieces(
    folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[SentencePieces | JsonPieces, Path]:
    """The tokenizer's pieces, and the file that they come from."""
    model, table = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model.exists() and not table.exists():
        raise InputError(
            "the folder has no tokenizer",
            where=folder,
            fix="copy the checkpoint's tokenizer.model (SentencePiece) or tokenizer.json there",
        )
    glm = config.get("model_type") == "chatglm"
    own = glm or _reads_model(settings) or not table.exists()
    if model.exists() and (own or piece_count(model)):  # a tiktoken file of the same name has none
        pieces = _from_model(member(folder, model.name), settings, glm)
        if own or same_tokens(member(folder, table.name), pieces):
            return pieces, model
    return JsonPieces(member(folder, table.name)), table


def _from_model(path: Path, settings: Mapping[str, Any], glm: bool) -> SentencePieces:
    added = read_added_tokens(path.parent)
    if glm:
        added += chatglm_tokens(piece_count(path), added)
    named = {**optional_json(path.parent, "special_tokens_map.json"), **settings}
    return SentencePieces(path, added, settings.get("legacy") is not False, named)


def _reads_model(settings: Mapping[str, Any]) -> bool:
    """Whether the checkpoint brings a tokenizer class of its own without a fast one: it reads tokenizer.model."""
    classes = settings.get("auto_map")
    named = classes.get("AutoTokenizer") if isinstance(classes, dict) else None
    return isinstance(named, list) and len(named) == 2 and named[0] is not None and named[1] is None


def _front(pieces: SentencePieces, settings: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    """What the classes that read tokenizer.model put in front: ChatGLM's its two marks, the others bos.

    BlueLM's, Llama's and Baichuan's add bos unless `add_bos_token` is there and not true, or bos_token is null.
    """
    if config.get("model_type") == "chatglm":
        marks = (pieces.id("[gMASK]"), pieces.id("sop"))
        return tuple(mark for mark in marks if mark is not None)
    wanted = settings.get("add_bos_token", True) is True and settings.get("bos_token", "") is not None
    return (pieces.bos,) if wanted and pieces.bos is not None else ()


def _first_id(value: object) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
