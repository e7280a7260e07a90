"""A pinned manifest of a folder: every file with its size and SHA-256, and how a folder differs from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bluelm.errors import InputError
from bluelm.system.files import sha256, write_text
from bluelm.system.reading import first_fault, read_record
from bluelm.trust.address import without_secrets
from bluelm.trust.safety import MAX_FILES, walk

MAX_BYTES = 64 << 20  # of a manifest file
PINNED = "bluelm-manifest.json"  # what `fetch` leaves beside the files
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PinnedFile(BaseModel):
    """One file: size in bytes and SHA-256 of its contents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: Sha256


class Origin(BaseModel):
    """Where a folder was fetched from.

    Attributes:
        revision: the commit that the hub resolved the asked revision to.
        mirror: address the bytes came from, when it was not the hub's own; without credentials.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hub: str
    repo: str
    revision: str
    mirror: str | None = None

    @field_validator("mirror")
    @classmethod
    def _no_secrets(cls, mirror: str | None) -> str | None:
        return mirror and without_secrets(mirror)


class FolderManifest(BaseModel):
    """Every file of a folder by its path with forward slashes."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    format: Literal["bluelm-export/folder-manifest/1"] = "bluelm-export/folder-manifest/1"
    origin: Origin | None = None
    files: dict[str, PinnedFile] = Field(max_length=MAX_FILES)

    @field_validator("files")
    @classmethod
    def _plain_paths(cls, files: dict[str, PinnedFile]) -> dict[str, PinnedFile]:
        for path in files:
            if path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
                raise ValueError(f"{path!r} is not a path inside the folder")
        return files

    @classmethod
    def of(cls, folder: Path, origin: Origin | None = None) -> FolderManifest:
        """Read every file of `folder`.

        Raises:
            InputError: links or special files.
        """
        files = {name: PinnedFile(bytes=path.stat().st_size, sha256=sha256(path)) for name, path in walk(folder)}
        return cls(origin=origin, files=files)

    @classmethod
    def open(cls, path: Path) -> FolderManifest:
        """Read a manifest file.

        Raises:
            InputError: missing, too large, or not as `bluelm-export manifest` writes it.
        """
        try:
            return cls.model_validate_json(read_record(path, MAX_BYTES, "the manifest"))
        except ValidationError as error:
            fix = "make it with `bluelm-export manifest FOLDER`"
            raise InputError(f"not a manifest: {first_fault(error)}", where=path, fix=fix) from error

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(self.model_dump(exclude_none=True), indent=1, sort_keys=True) + "\n")

    def digest(self) -> str:
        """Hex SHA-256 over names, sizes and digests; the same folder gives the same digest wherever it
        lies.
        """
        lines = (f"{file.sha256} {file.bytes} {name}\n" for name, file in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def digests(self) -> dict[str, str]:
        """SHA-256 by path."""
        return {name: file.sha256 for name, file in self.files.items()}


@dataclass(frozen=True)
class Difference:
    """One file that is not as the manifest says: `kind` is changed, missing or added."""

    path: str
    kind: Literal["changed", "missing", "added"]
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.path} ({self.detail})"


def differences(expected: Mapping[str, PinnedFile], found: Mapping[str, PinnedFile]) -> list[Difference]:
    """Every file that changed, is missing or was added, in the order of their names."""
    out: list[Difference] = []
    for path in sorted({*expected, *found}):
        old, new = expected.get(path), found.get(path)
        if old is None:
            out.append(Difference(path, "added", "not in the manifest"))
        elif new is None:
            out.append(Difference(path, "missing", f"{old.bytes} bytes in the manifest"))
        elif old.bytes != new.bytes:
            out.append(Difference(path, "changed", f"{new.bytes} bytes, {old.bytes} in the manifest"))
        elif old.sha256 != new.sha256:
            out.append(Difference(path, "changed", f"SHA-256 {new.sha256[:16]}…, pinned {old.sha256[:16]}…"))
    return out


def verify_folder(folder: Path, manifest: FolderManifest, ignore: frozenset[str] = frozenset()) -> None:
    """Check a folder against a manifest; `ignore` names files of the folder that no manifest can hold
    (itself).

    Raises:
        InputError: with every file that differs, one a line.
    """
    found = {name: file for name, file in FolderManifest.of(folder).files.items() if name not in ignore}
    raise_differences(differences(manifest.files, found), folder)


def raise_differences(found: list[Difference], where: object) -> None:
    """Raise InputError that lists the differences, if there are any."""
    if not found:
        return
    shown = "".join(f"\n  {difference}" for difference in found[:50])
    more = f"\n  and {len(found) - 50} more" if len(found) > 50 else ""
    count = f"{len(found)} file{'s differ' if len(found) > 1 else ' differs'}"
    fix = "fetch those files again from a source that you trust"
    raise InputError(f"{count} from the manifest:{shown}{more}", where=where, fix=fix)
