"""Files: writing that never leaves a half-written one, and reading that stays inside a checkpoint's folder.

Writing goes to a temporary name in the same folder, then one rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.system.reading import open_regular

DEVICE_ERRORS = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO)
TRY_AGAIN = "give the same command again; if this comes back, the disk or its connection fails"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:  # a write that finds the disk full does not say where
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def user_cache() -> Path:
    """What is made once on a machine lies here: `bluelm-export` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bluelm-export"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary empty folder beside `path`; on success it replaces `path`, on failure it is removed.

    Raises:
        InputError: `path` exists and is a file.
    """
    if path.exists() and not path.is_dir():
        raise InputError("the output exists and is not a folder", where=path, fix="name another output folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def removed_meanwhile(folder: Path) -> Iterator[None]:
    """Work in a folder that somebody may remove.

    Raises:
        InputError: a file is missing, and the folder with it.
    """
    try:
        yield
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        fix = "give the same command again: it begins anew"
        raise InputError("the folder was removed while it was worked in", where=folder, fix=fix) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, all or nothing."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """JSON with a line end, where numbers that JSON has not are "NaN", "Infinity" and "-Infinity"."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The same value with names in place of numbers that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def is_device_error(error: BaseException) -> bool:
    """Whether a disk or its connection failed, so that nothing is known of what the file holds.

    A library in C says so in words alone: torch raises a RuntimeError where a file cannot be mapped.
    """
    return getattr(error, "errno", None) in DEVICE_ERRORS or os.strerror(errno.EIO) in str(error)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces.

    Raises:
        InputError: it is missing, cannot be read, or is no regular file.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fix = "see that it is there and may be read"
        raise InputError(f"the file cannot be read: {error.strerror or error}", where=path, fix=fix) from error


def demo_checkpoint() -> Path:
    """Folder of the small trained BlueLM that ships with the package."""
    return Path(__file__).parents[1] / "demo"


def member(folder: Path, name: str) -> Path:
    """The path of the regular file `name` in a checkpoint folder.

    A link (or a name with `..`) may not lead out of the folder. The one exception is the layout of the
    Hugging Face hub's cache, `<repo>/snapshots/<revision>/file -> <repo>/blobs/<hash>`.

    Raises:
        InputError: the file is missing, is no regular file, or lies outside.
    """
    path = folder / name
    root = folder.resolve()
    try:
        resolved = path.resolve(strict=True)
    except FileNotFoundError:
        raise InputError(f"the file {name!r} is missing", where=folder, fix="complete the checkpoint") from None
    except (OSError, RuntimeError, ValueError) as error:  # link loops, names too long, zero bytes in names
        raise InputError(f"the file {name!r} cannot be opened: {error}", where=folder) from None
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(resolved.is_relative_to(home) for home in homes):
        raise InputError(
            f"{name!r} points outside the checkpoint's folder, to {resolved}",
            where=path,
            fix="copy the file into the folder",
        )
    if not resolved.is_file():
        raise InputError("this is not a regular file", where=path)
    return path
