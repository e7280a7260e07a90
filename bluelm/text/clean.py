"""Makes text from files safe to show: nothing in it controls a terminal or a CI system.

Names of tensors, keys, folders, phones and titles are untrusted. Characters that move the cursor, colour, rename the
window, turn the direction of writing or end a line unseen are shown as escapes (`\\x1b`); a line that GitHub or Azure
would read as a command gets a backslash in front.
"""

from __future__ import annotations

import re

# C0 and C1 but for tab and line feed; marks of direction; line and paragraph separators; halves of surrogate pairs
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
# actions/runner's ActionCommand: `::` in front, blanks left aside, and `##[` anywhere; Azure's agent: `##vso[` anywhere
_COMMAND = re.compile(r"^(?=[^\S\n]*::)", re.MULTILINE)
_INSIDE = re.compile(r"##(?=\[|vso\[)", re.IGNORECASE)
# ends of text that more of it may turn into either
_BEGUN = re.compile(r"(?:^[^\S\n]*:?|#(?:#(?:v(?:so?)?)?)?)\Z", re.MULTILINE | re.IGNORECASE)


def visible(text: str) -> str:
    """The text with an escape in place of each character that steers; tabs and line ends stay."""
    return _INSIDE.sub("#\\\\#", _UNSEEN.sub(_escape, text))


def clean(text: str) -> str:
    """The same, and no line of it is a command of a CI system."""
    return _COMMAND.sub(r"\\", visible(text))


class Pieces:
    """Text that comes in pieces, cleaned: together they are `clean` of the whole, however it was cut.

    What may yet become a command (blanks at a line's start, a colon behind them, `##`) is held back until it is seen
    what follows.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = ""  # a letter that stands for what the line began with

    def push(self, piece: str) -> str:
        """What may be shown now."""
        text = self._inside + self._held + _UNSEEN.sub(_escape, piece)
        found = _BEGUN.search(text)
        end = found.start() if found else len(text)
        shown, self._held = text[:end], text[end:]
        cleaned = clean(shown)[len(self._inside) :]
        if shown:
            self._inside = "" if shown.endswith("\n") else "x"
        return cleaned

    def flush(self) -> str:
        """What was held back."""
        held, self._held = self._inside + self._held, ""
        return clean(held)[len(self._inside) :]


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
