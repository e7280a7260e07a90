"""Texts and chats on which a runner's tokenizer and template are compared with the checkpoint's.

All are in Unicode's composed form: llama.cpp does not compose what a user typed in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bluelm.errors import InputError
from bluelm.text.tokenizer import Message, Tokenizer

HARD = (
    "",
    " ",
    "a",
    "  two  spaces ",
    " begins with one",
    "tab\tand\nline\n\n\nends\n",
    "\n\n  indented\n\t\tdeeper",
    "1234567890 3.14 1e-9 12,345 2024-05-31",
    "“引号”、《书名》，。！？；：（括号）……——",
    "汉字、繁體字，ひらがな 한국어 кириллица عربى हिन्दी",
    "中文and English混排123，再来。",
    "👩‍👩‍👧‍👦 😀🇨🇳 naïve café €",
    "def f(x):\n    return {'a': [x ** 2]}  # 平方\n",
    "I'm sure they'll say we've WON'T",
    "[|Human|]:你好[|AI|]:",
    "[|Human|]: </s> [|AI|]: <s>",
    "<|im_start|>user\n你好<|im_end|>\n<|endoftext|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
)
LONG = 20_000  # characters of the very long text


def long_text(texts: Sequence[str]) -> str:
    """So much of a corpus in one piece."""
    joined = "\n".join(texts) or "a very long text, 很长的一段。"
    return (joined * (LONG // len(joined) + 1))[:LONG]


def _chat(*turns: str, system: str = "") -> tuple[Message, ...]:
    """A user and an assistant in turn."""
    talk = [Message(("user", "assistant")[index % 2], turn) for index, turn in enumerate(turns)]
    return (*([Message("system", system)] if system else ()), *talk)


CHATS = (
    _chat("你好"),
    _chat("Hello, who are you?"),
    _chat("用两句话介绍一下长江。", system="你是一个简洁的助手。"),
    _chat("2 + 2 = ?", "4", "And times 10?"),
    _chat("写一首诗", "床前明月光，\n疑是地上霜。", "接着写", "举头望明月，\n低头思故乡。", "作者是谁？"),
    _chat("Fix this:\n\n```python\ndef f(x):\n    return x +\n```"),
    _chat("  leading and trailing spaces  "),
    _chat("😀 emoji, “quotes”, tabs\tand\n\nlines"),
    _chat("What is it?", "It is a test.", "Of what?", system="You answer in one line.\nNever two."),
    _chat("Name three colours.", "Red, green and"),  # an answer that is continued
)

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a <city>, “天气”, in °C & km/h.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "a city's name"},
                    "days": {"type": "integer", "minimum": 1},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}},
    },
)
WITH_TOOLS = (
    _chat("How warm is 北京 tomorrow?"),
    _chat("What time is it?", system="You answer in one line."),
)


def chats(tokenizer: Tokenizer) -> Iterator[tuple[tuple[Message, ...], Sequence[Mapping[str, Any]]]]:
    """Chats to compare, each with the tools that it is given: those with tools where the template knows them."""
    yield from ((chat, ()) for chat in CHATS)
    yield from ((chat, TOOLS) for chat in WITH_TOOLS if _tells(tokenizer, chat))


def _tells(tokenizer: Tokenizer, chat: Sequence[Message]) -> bool:
    """Whether the template says something of tools."""
    try:
        return tokenizer.chat(chat, tools=TOOLS) != tokenizer.chat(chat)
    except InputError:
        return False
