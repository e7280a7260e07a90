"""The chat template of a checkpoint: `read_template(folder, …)` gives a `ChatTemplate`, Jinja source as files have it.

`ChatTemplate.render(messages, tools=…, documents=…)` gives the chat's text; `bluelm.text.rendering` runs it in a
bounded sandbox. `.select(tools)` gives the source that is used for them, for a runner that renders by itself. The rest
of the tool uses `Tokenizer.template` (None where there is none: then chats are completed as text) and `Tokenizer.chat`.
`write_template` writes BlueLM's own template, which its checkpoints do not carry, as chat_template.jinja beside a
copied tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.system.files import member, write_text
from bluelm.system.reading import check_regular, read_bytes
from bluelm.text.added_tokens import token_text
from bluelm.text.rendering import THEN, render

FILE, MORE = "chat_template.jinja", "additional_chat_templates"
MOST_BYTES, MOST_TEMPLATES = 1 << 20, 100
DEFAULT, WITH_TOOLS = "default", "tool_use"
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
HERE = "\U0010fffd"  # private use: where a last message ends that is to be continued

# the documented prompt of BlueLM-7B-Chat; a content may be a list of parts, as some runners give it
BLUELM = """\
{%- macro text(content) %}
{%- if content is string %}{{ content }}{% else %}
{%- for part in content %}{{ part.text }}{% endfor %}{% endif %}
{%- endmacro %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- if not loop.first %}
{{- raise_exception("unknown role 'system' that is not the first message; known roles: user, assistant, function") }}
{%- endif %}
{{- '[|SYSTEM|]:' + text(message.content) }}
{%- elif message.role == 'user' %}
{{- '[|Human|]:' + text(message.content) }}
{%- elif message.role == 'assistant' %}
{{- '[|AI|]:' + text(message.content) + eos_token }}
{%- elif message.role in ['function', 'tool'] %}
{{- '[|Function|]:' + text(message.content) }}
{%- else %}
{{- raise_exception("unknown role '" + message.role + "'; known roles: system, user, assistant, function") }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[|AI|]:' }}{% endif %}
"""
BLUELM_WITHOUT_BOS = BLUELM.replace("{{- bos_token }}\n", "")  # of a tokenizer with `add_bos_token: false`


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja of a chat.

    Attributes:
        sources: by name; "default" is for all chats, "tool_use" for those with tools where there is one.
        where: the file that it comes from, or the folder of a BlueLM.
        tokens: what templates write by name: bos_token, eos_token, … as text.
    """

    sources: Mapping[str, str]
    where: Path
    tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def bluelm(self) -> bool:
        """Whether it is BlueLM's documented prompt, which no file of its checkpoints holds."""
        return dict(self.sources) in ({DEFAULT: BLUELM}, {DEFAULT: BLUELM_WITHOUT_BOS})

    def select(self, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The source for a chat with these tools, as transformers chooses it.

        Raises:
            InputError: several, and none of them is called default.
        """
        if tools is not None and WITH_TOOLS in self.sources:
            return self.sources[WITH_TOOLS]
        if DEFAULT not in self.sources:
            named = ", ".join(sorted(self.sources))
            raise InputError(f"no chat template is called default, only {named}", where=self.where)
        return self.sources[DEFAULT]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        now: datetime = THEN,
        **more: Any,
    ) -> str:
        """The chat's text.

        Args:
            messages: {"role": …, "content": …, …} each; keys without a value are left out.
            tools: JSON schemas. documents: {"title": …, "text": …} each.
            add_generation_prompt: end so that the model answers.
            continue_final_message: end inside the last message, so that the model goes on with it.
            now: for a template that names the date; by default a fixed day.
            more: what a template knows besides, `enable_thinking` and the like.

        Raises:
            InputError: no messages; or the template refuses them, fails, or needs more than it may.
        """
        if not messages:
            raise InputError("a chat needs at least one message")
        if continue_final_message and add_generation_prompt:
            raise InputError("a last message is either continued or answered", fix="omit one of the two")
        chat = [_normalized(message) for message in messages]
        if continue_final_message:
            chat[-1] = _open(chat[-1], self.where)
        variables = {
            **self.tokens, **more,
            "messages": chat, "tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        text = render(self.select(tools), variables, self.where, now)
        return _cut(text, self.where) if continue_final_message else text


def _normalized(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers gives it: without keys that are null, a thought under every name that templates read."""
    found = {key: value for key, value in message.items() if value is not None}
    thought = next((found[name] for name in THOUGHTS if name in found), None)
    return found if thought is None else {"thinking": thought, **found, "reasoning_content": thought}


def _open(message: dict[str, Any], where: Path) -> dict[str, Any]:
    """The message with a sign, and a space that shows whether the template trims, behind its content."""
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": content + HERE + " "}
    parts = list(content) if isinstance(content, (list, tuple)) else []
    last = max((index for index, part in enumerate(parts) if "text" in part), default=None)
    if last is None:
        raise InputError("the last message has no text that could be continued", where=where)
    parts[last] = {**parts[last], "text": parts[last]["text"] + HERE + " "}
    return message | {"content": parts}


def _cut(text: str, where: Path) -> str:
    at = text.rfind(HERE)
    if at < 0:
        raise InputError("the chat template leaves the last message out, so it cannot be continued", where=where)
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()


def read_template(
    folder: Path, settings: Mapping[str, Any], tokens: Mapping[str, str], bluelm: str | None
) -> ChatTemplate | None:
    """The checkpoint's template, as transformers finds it: files before tokenizer_config.json.

    Args:
        settings: of tokenizer_config.json.
        tokens: texts for `bos_token` and the like.
        bluelm: the template where the folder is a BlueLM's and holds none; None for other models.

    Raises:
        InputError: a template that is no text, or too long.
    """
    files = {DEFAULT: folder / FILE} if os.path.lexists(folder / FILE) else {}
    files |= {path.stem: path for path in template_files(folder) if path.parent.name == MORE}
    if files:
        sources = {name: _text(path) for name, path in files.items()}
        return ChatTemplate(sources, next(iter(files.values())), tokens)
    where = folder / "tokenizer_config.json"
    told = settings.get("chat_template")
    if told is not None:
        return ChatTemplate(_named(told, where), where, tokens)
    return None if bluelm is None else ChatTemplate({DEFAULT: bluelm}, folder, tokens)


def template_files(folder: Path) -> list[Path]:
    """chat_template.jinja and those of additional_chat_templates that are there, whatever they are.

    Raises:
        InputError: there are more than anybody has, or one is a folder, a pipe or a device.
    """
    found = [path for path in (folder / FILE, *sorted((folder / MORE).glob("*.jinja"))) if os.path.lexists(path)]
    if len(found) > MOST_TEMPLATES:
        raise InputError(f"{len(found)} chat templates: more than {MOST_TEMPLATES}", where=folder / MORE)
    return [member(folder, check_regular(path).relative_to(folder).as_posix()) for path in found]


def write_template(template: ChatTemplate | None, folder: Path) -> None:
    """BlueLM's own template as a file beside its tokenizer, where runners and transformers find it."""
    if template is not None and template.bluelm:
        write_text(folder / FILE, template.select())


def special_tokens(settings: Mapping[str, Any], known: Mapping[str, str | None]) -> dict[str, str]:
    """Texts of bos_token and the like: those of the files, null for none; else what the tokenizer knows (`known`)."""
    found = {name: token_text(settings[name]) if name in settings else known.get(name) for name in TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def _text(path: Path) -> str:
    try:
        return read_bytes(path, MOST_BYTES).decode()
    except UnicodeDecodeError:
        raise InputError("the chat template is not UTF-8", where=path, fix="fetch the file again") from None


def _named(told: object, where: Path) -> dict[str, str]:
    """A string, or a list of {"name": …, "template": …}."""
    rows = [{"name": DEFAULT, "template": told}] if isinstance(told, str) else told
    found: dict[str, str] = {}
    for row in rows if isinstance(rows, list) else ():
        name, source = (row.get("name"), row.get("template")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str) or len(source) > MOST_BYTES:
            break
        found[name] = source
    if not isinstance(rows, list) or not rows or len(found) < len(rows) or len(found) > MOST_TEMPLATES:
        fix = "fetch the file again"
        raise InputError("chat_template is neither text nor a list of names and templates", where=where, fix=fix)
    return found
