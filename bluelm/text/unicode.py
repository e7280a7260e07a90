"""Text that can be written: halves of surrogate pairs, which JSON's escapes and Jinja can spell, cannot."""

from __future__ import annotations

from bluelm.errors import InputError


def whole_characters(text: str, where: object) -> str:
    """The text itself.

    Raises:
        InputError: it holds half of a surrogate pair, which JSON's escapes can spell and no encoding can write.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        fix = "write the character itself in UTF-8, or both halves of its pair"
        raise InputError(f"{found} is half a character (an unpaired surrogate)", where=where, fix=fix) from None
    return text
