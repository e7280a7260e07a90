"""Regular expressions from untrusted files, matched by RE2.

RE2's time grows with the text and its memory has a limit, whatever the pattern; Python's own `re` can take longer than
any run on a pattern of ten characters. RE2 has no lookaround and no references back: such patterns are refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from bluelm.errors import InputError

MOST_CHARACTERS = 1000
MOST_PATTERNS = 2000  # in one file: eight linears of 100 blocks have 800 names
FIX = "write plain names, or an expression without lookaround and references back"


def check_count(count: int, where: object) -> None:
    """InputError where a file holds more patterns than it has linears to name."""
    if count > MOST_PATTERNS:
        raise InputError(f"{count} patterns: more than {MOST_PATTERNS}", where=where, fix="name modules by a pattern")


def matcher(pattern: str, where: object) -> Callable[[str], bool]:
    """Whether a text begins with the pattern, as `re.match` has it.

    Args:
        where: told with a pattern that is none.

    Raises:
        InputError: no regular expression, or one that RE2 cannot hold within its limits.
    """
    if len(pattern) > MOST_CHARACTERS:
        raise InputError(f"a pattern of {len(pattern)} characters", where=where, fix=FIX)
    library, options = _re2()
    try:
        compiled = library.compile(pattern, options)
    except (library.error, UnicodeEncodeError) as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
        raise InputError(f"{pattern!r} is not a valid pattern: {reason}", where=where, fix=FIX) from None
    return lambda text: compiled.match(text) is not None


@cache
def _re2() -> tuple[Any, Any]:
    library: Any = importlib.import_module("re2")  # it comes without types
    options = library.Options()
    options.log_errors = False
    return library, options
