"""The tokenizer of a checkpoint folder, and chats in the checkpoint's own template.

Text is data unless it is said to be trusted. A user's text that contains `[|AI|]:` or `</s>` literally is
spelled out in ordinary pieces: it reads the same, but cannot end a turn or speak for somebody else.
`encode(..., marks=True)` is for text that carries the template already; marks then count as in transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from bluelm.errors import InputError
from bluelm.system.files import member, write_text
from bluelm.text.added_tokens import chatglm_tokens, optional_json, read_added_tokens
from bluelm.text.jsonpieces import JsonPieces, copy_settings, same_tokens
from bluelm.text.sentencepieces import SentencePieces, piece_count
from bluelm.text.templates import FILE, THEN, ChatTemplate, read_sources, read_template, template_files, words

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    FILE,
)


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is mostly system, user, assistant or tool (BlueLM: function)."""

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
        template: of chats; None where the checkpoint brings none: then they are completed as text.
    """

    pieces: SentencePieces | JsonPieces
    bos: int | None
    eos: int | None
    pad: int | None
    source: Path
    template: ChatTemplate | None = None
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
        template = read_template(folder, settings, config, _words(folder, settings, pieces))
        return Tokenizer(pieces, bos, eos, pad, path, template, front)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.pieces.size

    def encode(self, text: str, bos: bool = False, marks: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            bos: put in front what the model's own tokenizer puts there, `front`.
            marks: the text is trusted: marks in it (`[|Human|]:`, `</s>`, added tokens) become their token.
        """
        return (list(self.front) if bos else []) + self.pieces.encode(text, trusted=marks)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; control tokens and ids without a piece give none."""
        return self.pieces.decode(tokens)

    def stream(self, continues: bool = False) -> StreamDecoder:
        """A decoder of generated tokens; `continues`: they continue a text, so leading white space counts."""
        return self.pieces.stream(continues)

    def chat(
        self, messages: Sequence[Message | Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None, resume: bool = False, now: datetime = THEN,
    ) -> list[int]:  # fmt: skip
        """Token ids of a chat in the model's template, ending for the model to answer, or behind a last answer.

        Contents are data. Without a template the contents are a text, line by line.

        Args:
            messages: also as transformers has them, with `tool_calls` and other fields.
            tools, documents: JSON schemas of functions; texts to answer from. For templates that know them.
            resume: the model continues the last message (`continue_final_message`).
            now: today for a template that names the date; a fixed day where tokens must be the same tomorrow.

        Raises:
            InputError: no messages, or the template refuses them or fails.
        """
        if not messages:
            raise InputError("a chat needs at least one message")
        given = [asdict(message) if isinstance(message, Message) else message for message in messages]
        if self.template is None:
            texts = [message.get("content") for message in given]
            return self.encode("\n".join(text for text in texts if isinstance(text, str)), bos=True)
        template = self.template if self.template.own else self._with_end(self.template)
        parts = template.render(
            given, self.pieces.control, tools=tools, documents=documents, generate=given[-1].get("role") != "assistant",
            resume=resume, now=now,
        )  # fmt: skip
        return ([] if template.own else list(self.front)) + self.pieces.encode_parts(parts)

    def check_roles(self, roles: Sequence[str]) -> None:
        """Make sure that the template holds a chat of these roles.

        Raises:
            InputError: it refuses them, or fails.
        """
        self.chat([Message(role, "a") for role in roles])

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

    def _with_end(self, template: ChatTemplate) -> ChatTemplate:
        """BlueLM's template with the token that ends an answer."""
        text = None if self.eos is None else self.pieces.text(self.eos)
        if text is None:
            raise InputError("the tokenizer has no end token", where=self.source, fix="set eos_token_id in config.json")
        return replace(template, words={"eos_token": text})


def files_of(folder: Path) -> tuple[str, ...]:
    """Names of all files that a folder's tokenizer may be in, those of its chat templates among them."""
    return (*TOKENIZER_FILES, *(name for name in template_files(folder) if name != FILE))


def copy_files(folder: Path, to: Path) -> None:
    """Copy the files of a folder's tokenizer, without truncation and padding that were saved with it.

    Raises:
        InputError: tokenizer.json cannot be read.
    """
    files = template_files(folder)
    folded = files != [FILE] * len(files)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file() and not (folded and name == FILE):
            copy = copy_settings if name == "tokenizer.json" else shutil.copyfile
            copy(folder / name, to / name)
    if folded:  # a folder of templates becomes the list that tokenizer_config.json may hold as well
        settings = optional_json(folder, "tokenizer_config.json")
        sources = read_sources(folder, settings)[0]
        named = [{"name": name, "template": source} for name, source in sources.items()]
        write_text(to / "tokenizer_config.json", json.dumps(settings | {"chat_template": named}, ensure_ascii=False))


def _words(folder: Path, settings: Mapping[str, Any], pieces: SentencePieces | JsonPieces) -> dict[str, str]:
    """Texts of the tokens that a template may name; a tokenizer.model names its own where no file does."""
    own = {"bos_token": pieces.bos, "eos_token": pieces.eos} if isinstance(pieces, SentencePieces) else {}
    defaults = {key: pieces.text(token) for key, token in own.items() if token is not None}
    return words({**optional_json(folder, "special_tokens_map.json"), **settings}, defaults)


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
