"""Text out of files made fit to be shown: nothing in it steers a terminal or a CI system.

Names of tensors, keys, folders, phones and titles are anybody's. Characters that move the cursor, colour, rename the
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


def visible(text: str) -> str:
    """The text with an escape in place of each character that steers; tabs and line ends stay."""
    return _INSIDE.sub("#\\\\#", _UNSEEN.sub(_escape, text))


def clean(text: str) -> str:
    """The same, and no line of it is a command of a CI system."""
    return _COMMAND.sub(r"\\", visible(text))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
