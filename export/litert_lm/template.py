"""A checkpoint's chat template as LiteRT-LM renders it, by minijinja.

LiteRT-LM gives a content as a list of parts, knows no special token by its name, and puts what begins a text in front
itself. So the names stand before the template, that of the begin token empty where LiteRT-LM writes it, and messages
whose contents are joined.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from bluelm.errors import InputError, TargetError
from bluelm.text.templates import DEFAULT, ChatTemplate
from bluelm.text.tokenizer import Tokenizer

BOS = "bos_token"
JOINED = (
    "{% set chat = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% if message.content is defined and message.content is not string and message.content is sequence %}"
    "{% set joined = namespace(text='') %}"
    "{% for part in message.content %}"
    "{% if part.text is defined %}{% set joined.text = joined.text ~ part.text %}{% endif %}"
    "{% endfor %}"
    "{% set chat.messages = chat.messages + [dict(message, content=joined.text)] %}"
    "{% else %}{% set chat.messages = chat.messages + [message] %}{% endif %}"
    "{% endfor %}"
    "{% set messages = chat.messages %}\n"
)
"""Behind it `messages` have strings as contents; the newline belongs to the last tag, as `trim_blocks` has it."""


def runner_template(tokenizer: Tokenizer) -> str | None:
    """The checkpoint's template behind what LiteRT-LM does not tell it; None where there is none.

    Raises:
        InputError: it has several, and none for all chats.
    """
    template = tokenizer.template
    if template is None:
        return None
    return names(template.tokens, bool(tokenizer.front)) + JOINED + template.select()


def names(tokens: Mapping[str, str], begun: bool) -> str:
    """Special tokens by name; `begun`: that which begins a text is written already."""
    told = {name: "" if begun and name == BOS else text for name, text in tokens.items()}
    return "".join(f"{{% set {name} = {json.dumps(text, ensure_ascii=False)} %}}" for name, text in told.items())


def check_begin(tokenizer: Tokenizer) -> None:
    """Whether texts and chats begin as LiteRT-LM begins both: with one token, which it writes itself, or with none.

    Raises:
        TargetError: they do not.
    """
    if len(tokenizer.front) > 1:
        texts = " ".join(map(str, tokenizer.front))
        problem = f"LiteRT-LM begins a text with one token or none, this tokenizer with the tokens {texts}"
        raise TargetError(problem, where=tokenizer.source, fix="use the runtime litert")
    if not tokenizer.front or tokenizer.template is None:
        return
    begin = tokenizer.pieces.text(tokenizer.front[0]) or ""
    chat, template = [{"role": "user", "content": "a"}], tokenizer.template
    runners = ChatTemplate({DEFAULT: runner_template(tokenizer) or ""}, template.where)
    try:
        text = template.render(chat, add_generation_prompt=True)
        rest = runners.render(chat, add_generation_prompt=True)
    except InputError:  # of a template that takes no such chat
        return
    if text != begin + rest:
        problem = f"LiteRT-LM begins chats as it does texts, with {begin}, and this template does not leave that to it"
        raise TargetError(problem, where=template.where, fix="use the runtime litert")
