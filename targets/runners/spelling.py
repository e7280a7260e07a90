"""The text that a program reads as given tokens, for programs that take nothing but text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from bluelm.errors import InputError


def spelled(
    tokens: Sequence[int],
    marks: Collection[int],
    decode: Callable[[list[int]], str],
    encode: Callable[[str], list[int]],
    program: str,
) -> str:
    """A text that is read as these tokens.

    Args:
        marks: tokens that are one wherever their text stands; behind one the program may put a space in front.

    Raises:
        InputError: none was found.
    """
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts += [[token], []] if token in marks else []
        parts[-1] += [] if token in marks else [token]
    texts = [decode(part) if part else "" for part in parts]
    for found in ("".join(texts), "".join(text.removeprefix(" ") for text in texts)):
        if encode(found) == list(tokens):
            return found
    raise InputError(f"{program} takes text, and no text is read as these tokens", fix="give tokens of a whole text")
