"""Chats by a tokenizer of Hugging Face's `transformers`, as programs around it ask for them."""

from __future__ import annotations

from functools import partial
from typing import Any

from bluelm.errors import InputError
from targets.runners import messages as m


def prompted(tokenizer: Any, message: m.Chat, program: str) -> m.Prompted:
    """The template's text and tokens; an answer at the end is continued.

    Raises:
        InputError: the template refuses the chat, or there is none.
    """
    continues = message.messages[-1]["role"] == "assistant"
    ends = {"add_generation_prompt": not continues, "continue_final_message": continues}
    template = partial(tokenizer.apply_chat_template, tools=list(message.tools) or None)
    try:
        text = template(list(message.messages), tokenize=False, **ends)
        tokens = [int(token) for token in template(list(message.messages), tokenize=True, return_dict=False, **ends)]
    except Exception as error:  # noqa: BLE001  (of Jinja's, of the library's, or the template's own)
        raise InputError(f"{program} refuses the chat: {error}") from None
    return m.Prompted(text, tokens, None)
