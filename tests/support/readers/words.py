"""The readers of a model's own words: end tokens, special tokens, chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from bluelm.text.tokenizer import Tokenizer
from tests.support.files import reader_files as valid
from tests.support.readers.reader import Reader

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHAT = ({"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "?"})
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def _beside(name: str, data: bytes, more: Mapping[str, bytes] | None = None) -> Callable[[], Reader]:
    """A file beside a tokenizer; read as a run reads it, up to the tokens of chats."""
    return lambda: Reader({"tokenizer.model": valid.piece_bytes(), **(more or {}), name: data}, name, _chat)


def _chat(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    for tools in (None, [TOOL]):
        tokenizer.chat(CHAT, tools=tools)
    tokenizer.encode("a", bos=True, marks=True)


def _generation() -> Reader:
    said = b'{"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.7, "do_sample": true}'
    files = {**valid.checkpoint(), "generation_config.json": said}
    return Reader(files, "generation_config.json", valid.read_checkpoint)


SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "additional_special_tokens": ["<x>"]}
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TEMPLATE}]
READERS: dict[str, Callable[[], Reader]] = {
    "generation config": _generation,
    "special tokens": _beside("special_tokens_map.json", json.dumps(SPECIAL).encode()),
    "chat template": _beside("chat_template.jinja", TEMPLATE.encode()),
    "another chat template": _beside(
        "additional_chat_templates/tool_use.jinja", TEMPLATE.encode(), {"chat_template.jinja": TEMPLATE.encode()}
    ),
    "chat template of the config": _beside(
        "tokenizer_config.json", json.dumps({**SPECIAL, "chat_template": TEMPLATE}).encode()
    ),
    "named chat templates": _beside("tokenizer_config.json", json.dumps({**SPECIAL, "chat_template": NAMED}).encode()),
}
