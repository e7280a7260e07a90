"""Portable file names: valid on every system, and no two of them equal on any."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from unicodedata import category, normalize

from bluelm.errors import InputError

_DEVICES = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]", re.IGNORECASE)  # of Windows
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's classes of what steers a terminal, or is no text


def check_name(name: str, where: object = None) -> None:
    """Refuse names that leave the folder, or that another system would read differently.

    Raises:
        InputError: absolute, with `..`, a backslash, a drive, control characters or empty parts; reserved by Windows
            (its devices, a dot or blank at a part's end, signs that no name may have).
    """
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or any(c in name for c in "\\:"):
        raise InputError(f"the name {name!r} is not a plain relative path", where=where)
    if any(category(c) in _UNSEEN for c in name):
        raise InputError(f"the name {name!a} holds control characters", where=where)
    if len(name.encode()) > 1024 or any(len(part.encode()) > 255 for part in parts):
        raise InputError(f"the name {name[:60]!r}… is too long", where=where)
    if PurePosixPath(name).as_posix() != name:
        raise InputError(f"the name {name!r} is not in its plain form", where=where)
    for part in parts:
        if part[-1] in ". " or any(c in part for c in '<>"|?*') or _DEVICES.fullmatch(part.partition(".")[0].rstrip()):
            raise InputError(f"the name {name!r} is reserved on Windows", where=where, fix="rename the file")


def check_names(names: Iterable[str], where: object = None) -> None:
    """Refuse names that are one file, or a file and a folder, where case or Unicode's form make no difference.

    Raises:
        InputError: naming both, or see `check_name`.
    """
    spelled: dict[str, tuple[str, bool]] = {}  # a folded path: as it was met first, and whether a file
    for name in sorted(set(names)):
        check_name(name, where)
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            met = "/".join(parts[:depth]), depth == len(parts)
            first = spelled.setdefault(_folded(met[0]), met)
            if first != met:
                problem = f"{first[0]!r} and {name!r} are one name on systems that overlook case or Unicode's form"
                raise InputError(problem, where=where, fix="rename one")


def _folded(path: str) -> str:
    """The same for paths that differ in case or Unicode form alone: canonical caseless matching, Unicode 3.13 D145."""
    return normalize("NFD", normalize("NFD", path).casefold())
