"""Bundles that are folders: the plain signed folder, and projects with the payload inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bluelm.errors import InputError
from bluelm.system.files import atomic_folder
from bluelm.trust.safety import walk
from export.bundle import payload
from export.bundle.manifest import FILE, Format
from export.bundle.zip32 import Contents, FileSource


def write(whole: payload.Payload, out: Path, home: str = "", around: Mapping[str, bytes] | None = None) -> Path:
    """Write a folder, all or nothing.

    Args:
        home: where in the folder the payload lies; "" for its root.
        around: the other files, by path.
    """
    with atomic_folder(out) as temporary:
        for path, data in (around or {}).items():
            target = temporary / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod(0o755 if data.startswith(b"#!") else 0o644)
        extract({c.path: c.source for c in whole.contents}, temporary / home)
    return out


def extract(sources: Mapping[str, Contents], folder: Path) -> None:
    """Write files into a folder; their names were checked when they were read."""
    for path, source in sources.items():
        target = folder / path
        if not target.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path!r} leads out of the folder", where=folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            for piece in source.pieces():
                out.write(piece)


def verify(folder: Path, home: str = "") -> payload.CheckedPayload:
    """Check a folder bundle: every file is either of the payload or named by the manifest's container.

    Raises:
        InputError: what differs, file by file.
    """
    prefix = f"{home}/" if home else ""
    sources: dict[str, Contents] = {}
    around: dict[str, str] = {}
    for name, path in walk(folder):
        if name.startswith(prefix):
            sources[name.removeprefix(prefix)] = FileSource(path)
        else:
            payload.check_size(FileSource(path), name)  # a project's files are small
            around[name] = payload.measure(name, "", FileSource(path)).sha256
    if FILE not in sources:
        raise InputError(f"the folder holds no {prefix}{FILE}: not a bundle", where=folder)
    return payload.verify(sources, around, folder)


def find_home(folder: Path, homes: Mapping[Format, str]) -> Format | None:
    """The format whose place for the payload holds a manifest."""
    for name, home in homes.items():
        if (folder / home / FILE).is_file():
            return name
    return None
