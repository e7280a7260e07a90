"""The chat template of a checkpoint: where it stands, and how a chat becomes text that the tokenizer may trust.

BlueLM's checkpoints carry none; its documented prompt is `bluelm.jinja`. No template is guessed from token names.
Contents are data: a control token that a user typed is spelled out, and ends nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from bluelm.errors import InputError
from bluelm.system.files import member
from bluelm.system.reading import read_text
from bluelm.text.added_tokens import token_text
from bluelm.text.rendering import render

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
DEFAULT, TOOLS = "default", "tool_use"
MOST_BYTES, MOST_TEMPLATES = 1 << 20, 100
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # tokens that a template may name
BLUELM = Path(__file__).with_name("bluelm.jinja").read_text(encoding="utf-8")
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around a user's control tokens; Unicode keeps both for use inside a program
GUARDED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")
THEN = datetime(2024, 7, 26)  # "today" of chats that must be the same tomorrow: what Llama 3.1's template says itself
CONTINUED = "\ufdd2 "  # behind a message that the model is to continue; a template that trims takes the space


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja sources by name.

    Attributes:
        where: the file that they come from.
        words: texts of `bos_token`, `eos_token`, … as the tokenizer names them.
        own: the checkpoint's own; False for BlueLM's documented one, which begins with what begins a text.
    """

    sources: Mapping[str, str]
    where: Path
    words: Mapping[str, str]
    own: bool = True

    def source(self, tools: bool) -> str:
        """The one for a chat with or without tools, as transformers chooses.

        Raises:
            InputError: several, and none is the default.
        """
        name = TOOLS if tools and TOOLS in self.sources else DEFAULT
        if name not in self.sources:
            found = ", ".join(sorted(self.sources))
            raise InputError(f"no chat template is called {DEFAULT!r}, found {found}", where=self.where)
        return self.sources[name]

    def render(
        self, messages: Sequence[Mapping[str, Any]], control: re.Pattern[str] | None, *,
        tools: Sequence[Mapping[str, Any]] | None = None, documents: Sequence[Mapping[str, Any]] | None = None,
        generate: bool = True, resume: bool = False, now: datetime = THEN,
    ) -> list[tuple[str, bool]]:  # fmt: skip
        """The chat as parts that follow one another: text, and whether control tokens in it count.

        Args:
            control: finds control tokens in what a user wrote; they do not count. None: there are none.
            generate: ends so that the model answers (`add_generation_prompt`).
            resume: ends inside the last message, which the model continues (`continue_final_message`).

        Raises:
            RefusedChatError, InputError: see `bluelm.text.rendering.render`; or the last message cannot be continued.
        """
        given = {"messages": list(map(_normal, messages)), "tools": tools and list(tools),
                 "documents": documents and list(documents)}  # fmt: skip
        given = _guard(given, control)
        if resume:
            _tag(given["messages"][-1], self.where)
        variables = {**self.words, **given, "add_generation_prompt": generate and not resume}
        text = render(self.source(tools is not None), variables, now, self.where)
        if resume:
            text = _cut(text, self.where)
        return list(_parts(text))


def read_template(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any],
                  words: Mapping[str, str]) -> ChatTemplate | None:  # fmt: skip
    """The folder's, or BlueLM's for a BlueLM that brings none; None for any other without one.

    Args:
        settings, config: tokenizer_config.json and config.json.

    Raises:
        InputError: a file or an entry that is no template.
    """
    sources, where = read_sources(folder, settings)
    if sources:
        return ChatTemplate(sources, where, words)
    return ChatTemplate({DEFAULT: BLUELM}, folder / "config.json", words, own=False) if _is_bluelm(config) else None


def read_sources(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, str], Path]:
    """The folder's templates by name, and the file that they come from.

    Where there are files of templates they alone count, not `chat_template` of tokenizer_config.json, as in
    transformers.

    Raises:
        InputError: a file or an entry that is no template.
    """
    files = template_files(folder)
    if not files:
        where = folder / "tokenizer_config.json"
        return _listed(settings.get("chat_template"), where), where
    texts = [read_text(member(folder, name), MOST_BYTES, "the chat template") for name in files]
    names = [DEFAULT if name == FILE else Path(name).name.removesuffix(".jinja") for name in files]
    return dict(zip(names, texts, strict=True)), folder / files[0]


def template_files(folder: Path) -> list[str]:
    """Names of the folder's files of templates, the default one first."""
    more = sorted(path.name for path in (folder / FOLDER).glob("*.jinja"))[:MOST_TEMPLATES]
    return [FILE] * (folder / FILE).is_file() + [f"{FOLDER}/{name}" for name in more]


def words(named: Mapping[str, Any], defaults: Mapping[str, str | None]) -> dict[str, str]:
    """Texts of the tokens that a template may name.

    Args:
        named: tokenizer_config.json, and special_tokens_map.json behind it.
        defaults: texts where they say nothing.
    """
    keys = [f"{name}_token" for name in NAMED]
    found = {key: token_text(named[key]) if key in named else defaults.get(key) for key in keys}
    return {key: text for key, text in found.items() if text is not None}


def _listed(value: object, where: Path) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json: a text, or a list of named ones."""
    entries = value if isinstance(value, list) else [] if value is None else [{"name": DEFAULT, "template": value}]
    sources: dict[str, str] = {}
    for entry in entries[: MOST_TEMPLATES + 1]:
        name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str) or len(source) > MOST_BYTES:
            problem = f"chat_template must be a text of at most {MOST_BYTES} characters, or a list of named ones"
            raise InputError(problem, where=where, fix="fetch the file again")
        sources[name] = source
    return sources


def _is_bluelm(config: Mapping[str, Any]) -> bool:
    named = config.get("architectures")
    names = [config.get("model_type"), *(named if isinstance(named, list) else [])]
    return any(str(name).lower() in ("bluelm", "bluelmforcausallm") for name in names)


def _normal(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null, and reasoning under each of the names that templates read."""
    kept = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((kept[name] for name in names if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _guard(value: Any, control: re.Pattern[str] | None) -> Any:
    """A copy of a JSON value whose texts have marks around their control tokens."""
    if isinstance(value, str):
        bare = value.replace(OPEN, "").replace(CLOSE, "")
        return value if control is None else control.sub(rf"{OPEN}\g<0>{CLOSE}", bare)
    if isinstance(value, Mapping):
        return {key: _guard(inner, control) for key, inner in value.items()}
    return [_guard(inner, control) for inner in value] if isinstance(value, list | tuple) else value


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Marked text at odd places of the split; a mark that lost its other one (a template cut the text) only parts."""
    for index, part in enumerate(GUARDED.split(text)):
        if part:
            yield part, index % 2 == 0


def _tag(message: dict[str, Any], where: Path) -> None:
    """Put `CONTINUED` behind the content, or behind its last part that has text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + CONTINUED
        return
    part = next((part for part in reversed(content or []) if isinstance(part, dict) and "text" in part), None)
    if part is None:
        raise InputError("the last message has no text to continue", where=where)
    part["text"] += CONTINUED


def _cut(text: str, where: Path) -> str:
    kept, tag, behind = text.rpartition(CONTINUED.strip())
    if not tag:
        raise InputError("the chat template leaves out the end of the message that is to be continued", where=where)
    return kept if behind.startswith(" ") else kept.rstrip()


Kind = Literal["the checkpoint's", "BlueLM's", "none"]


def kind(template: ChatTemplate | None) -> Kind:
    """Whose it is, for a report."""
    return "none" if template is None else "the checkpoint's" if template.own else "BlueLM's"
