"""A way in for foreign bytes: a small valid input, which file of it is mutated, and the code that reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bluelm.errors import ExportError


@dataclass(frozen=True)
class Reader:
    """A way in: valid files by name, which of them is mutated, and the code that reads the folder.

    `exact`: what is signed, so that nothing but the valid input may be accepted. `mends`: a note of our own, which
    counts as missing where it cannot be read, and is written anew.
    """

    files: Mapping[str, bytes]
    target: str
    read: Callable[[Path], object]
    exact: bool = False
    mends: bool = False

    @property
    def seed(self) -> bytes:
        return self.files[self.target]

    def write(self, folder: Path) -> None:
        """The valid files into a folder."""
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def allowed(reader: Reader, folder: Path, data: bytes) -> bool:
    """Read the folder with `data` as the target; True when it was accepted, False when it was refused.

    Raises:
        whatever a faulty reader lets through.
    """
    (folder / reader.target).write_bytes(data)
    try:
        reader.read(folder)
    except ExportError:
        return False
    if reader.exact and data != reader.seed:
        raise AssertionError("a changed bundle was accepted")
    return True


def fresh(reader: Reader, folder: Path) -> Path:
    """An empty folder with the reader's valid files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader.write(folder)
    return folder
