"""The tokenizer of a checkpoint folder, and its chats: `Tokenizer.chat` renders the checkpoint's own template.

Text is data unless it is marked as trusted. A user's text that contains `[|AI|]:` or `</s>` literally is encoded as
ordinary pieces: it reads the same, but cannot end a turn or speak for somebody else. `encode(..., marks=True)` is for
text that a template has rendered already; special tokens then count as in transformers. A checkpoint that has no
template and is no BlueLM has `template` None, and its chats are plain text.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bluelm.errors import InputError
from bluelm.system.files import member
from bluelm.text.added_tokens import chatglm_tokens, optional_json, read_added_tokens
from bluelm.text.guard import guarded, parts
from bluelm.text.jsonpieces import JsonPieces, copy_settings, same_tokens
from bluelm.text.sentencepieces import SentencePieces, piece_count
from bluelm.text.templates import (
    BLUELM,
    BLUELM_WITHOUT_BOS,
    ChatTemplate,
    read_template,
    special_tokens,
    template_files,
    write_template,
)

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
NO_TEMPLATE = "the checkpoint has no chat template, so chats are completed as plain text"


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is one that the template knows: mostly system, user, assistant, tool."""

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
        template: of chats; None for a model that has none.
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
            InputError: neither is there, or a file (a template's, too) is damaged.
            UnavailableError: tokenizer.json without the `tokenizers` library.
        """
        folder = Path(folder)
        settings = optional_json(folder, "tokenizer_config.json")
        config = optional_json(folder, "config.json")
        named = optional_json(folder, "special_tokens_map.json") | settings
        pieces, path = _pieces(folder, settings, config)
        bos, eos, pad = (
            _first_id(config.get(f"{name}_token_id")) if found is None else found
            for name, found in (("bos", pieces.bos), ("eos", pieces.eos), ("pad", pieces.pad))
        )
        if named.get("bos_token", "") is None:
            bos = None
        front = pieces.front() if isinstance(pieces, JsonPieces) else _front(pieces, settings, config)
        ids = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        texts = special_tokens(named, {name: None if i is None else pieces.text(i) for name, i in ids.items()})
        own = (BLUELM if front else BLUELM_WITHOUT_BOS) if _is_bluelm(config) else None
        return Tokenizer(pieces, bos, eos, pad, path, read_template(folder, settings, texts, own), front)

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
        return self._begin(bos) + self.pieces.encode(text, trusted=marks)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; control tokens and ids without a piece give none."""
        return self.pieces.decode(tokens)

    def stream(self, continues: bool = False) -> StreamDecoder:
        """A decoder of generated tokens; `continues`: they continue a text, so leading white space counts."""
        return self.pieces.stream(continues)

    def check_chat(self, messages: Sequence[Message | Mapping[str, Any]], **more: Any) -> None:
        """Make sure that the template takes a chat.

        Raises:
            InputError: see `chat`.
        """
        if self.template is not None:
            self.template.render([_as_mapping(turn) for turn in messages], **more)

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **more: Any,
    ) -> list[int]:
        """Token ids of a chat as the checkpoint's template writes it. Contents are data.

        Without a template: the contents as one text, a line each, behind what begins a text.

        Args:
            messages: in the shape of transformers' `apply_chat_template`, or `Message`.
            tools, documents, more: what the template is told besides; `now`, for one that names the date, is a fixed
                day by default: tokens of calibration and judging must be the same tomorrow.
            add_generation_prompt: end so that the model answers; None: unless the last message is an answer.
            continue_final_message: end inside the last message.

        Raises:
            InputError: no messages, or the template refuses them (a role that it lacks) or fails.
        """
        chat = [_as_mapping(turn) for turn in messages]
        if not chat:
            raise InputError("a chat needs at least one message")
        if self.template is None:
            return self.encode("\n".join(plain_text(turn) for turn in chat), bos=True)
        given = {"messages": chat, "tools": tools, "documents": documents, **more}
        marked = guarded(given, self.pieces.marks)
        answered = continue_final_message or chat[-1].get("role") == "assistant"
        text = self.template.render(
            **(given if marked is None else marked),
            add_generation_prompt=not answered if add_generation_prompt is None else add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self.pieces.encode(text, trusted=True) if marked is None else self.pieces.encode_parts(parts(text))

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


def copy_files(folder: Path, to: Path, but: Collection[str] = ()) -> list[str]:
    """Copy the files of a folder's tokenizer, without truncation and padding that were saved with it.

    Args:
        but: names of files that are made otherwise.

    Returns:
        Their names, relative to the folder.

    Raises:
        InputError: tokenizer.json cannot be read.
    """
    names = [name for name in tokenizer_files(folder) if name not in but]
    for name in names:
        (to / name).parent.mkdir(exist_ok=True)
        copy = copy_settings if name == "tokenizer.json" else shutil.copyfile
        copy(folder / name, to / name)
    return names


def copy_own(folder: Path, to: Path) -> None:
    """Copy a checkpoint's files, and write BlueLM's template, which its checkpoints lack, beside them.

    Raises:
        InputError: one of them cannot be read.
    """
    if copy_files(folder, to):
        write_template(Tokenizer.from_folder(folder).template, to)


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Names of the tokenizer's and the chat templates' files that a folder has, relative to it."""
    own = (name for name in TOKENIZER_FILES if (folder / name).is_file())
    return (*own, *(path.relative_to(folder).as_posix() for path in template_files(folder)))


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


def _is_bluelm(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    named = isinstance(names, list) and "BlueLMForCausalLM" in names
    return named or config.get("model_type") == "BlueLM"


def _as_mapping(turn: Message | Mapping[str, Any]) -> dict[str, Any]:
    return {"role": turn.role, "content": turn.content} if isinstance(turn, Message) else dict(turn)


def plain_text(turn: Mapping[str, Any]) -> str:
    """What a message says: its content, or the texts among the parts of one."""
    content = turn.get("content")
    found = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else [content]
    return "".join(text for text in found if isinstance(text, str))


def _first_id(value: object) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
