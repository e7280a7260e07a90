"""Contents are data: special tokens (`<|im_end|>`, `</s>`) written by a user, a tool or a document do not end a turn.

Before a template renders, every special token in its contents is put between two private-use characters; the rendered
text is then split at these, and what was between them is encoded as ordinary pieces. A chat without special tokens in
its contents is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

BEGIN, END = "\U0010fffb", "\U0010fffc"
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")  # the signs' planes: no content may hold one where signs are used
_PARTS = re.compile(f"{BEGIN}([^{BEGIN}{END}]*){END}|[{BEGIN}{END}]")

Part = tuple[str, bool]
"""A text, and whether it is data."""


def guarded(value: Any, marks: re.Pattern[str] | None) -> Any | None:
    """The JSON value with signs around each mark in its texts; None where there is no mark.

    Keys stay as they are.
    """
    found = False

    def sign(match: re.Match[str]) -> str:
        nonlocal found
        found = True
        return f"{BEGIN}{match[0]}{END}" if match[0] else ""

    if marks is None:
        return None
    changed = _mapped(value, lambda text: marks.sub(sign, PRIVATE.sub("", text)))
    return changed if found else None


def parts(text: str) -> list[Part]:
    """A rendered text as the template's own parts and the marks that are data; a sign left alone only divides."""
    found: list[Part] = []
    start = 0
    for match in _PARTS.finditer(text):
        found.append((text[start : match.start()], False))
        if match[1]:
            found.append((match[1], True))
        start = match.end()
    return [part for part in [*found, (text[start:], False)] if part[0]]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return value
