"""Lists and downloads from Hugging Face, ModelScope and their mirrors.

The hubs' own clients say where a hub is and who is logged in. They bound neither how much a server sends nor how long
it takes, so the bytes come through `transfer`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from bluelm.errors import InputError, UnavailableError
from bluelm.trust.address import Address
from bluelm.trust.paths import check_names
from bluelm.trust.safety import MAX_FILES
from bluelm.trust.transfer import Absent, BoundedServer, Limits

LARGEST = 1 << 50  # bytes that a file of a model may have
MIRROR_TOKEN = "BLUELM_MIRROR_TOKEN"  # the variable of the environment with a mirror's token
TRUNCATED = 3000  # files at which ModelScope cuts a listing off, unsaid


@dataclass(frozen=True)
class ListedFile:
    """What a hub says of one file: bytes, and the SHA-256 of its contents or the SHA-1 of its git blob."""

    size: int
    sha256: str | None = None
    git_sha1: str | None = None


class Hub(Protocol):
    """One hub, or a mirror of it.

    Attributes:
        address: what may be shown of where it is.
    """

    name: str
    address: str

    def listing(self, repo: str, revision: str) -> tuple[str, Mapping[str, ListedFile]]:
        """(resolved revision, files).

        Raises:
            InputError: there is no such model, or what the hub says of it is no listing.
            UnavailableError: the hub does not answer.
        """
        ...

    def download(self, repo: str, revision: str, path: str, part: Path, size: int, got: Callable[[int], None]) -> None:
        """Bring one file into `part`; see `Server.file`."""
        ...


class HuggingFace:
    """huggingface.co (or $HF_ENDPOINT); without an address, with the token of who is logged in."""

    name = "huggingface"

    def __init__(self, address: str | None = None, limits: Limits | None = None) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import constants  # a submodule: not there before it is imported
        except ImportError as error:
            raise UnavailableError("huggingface_hub is missing", fix="pip install 'bluelm-export[hub]'") from error
        token = huggingface_hub.get_token() if address is None else os.environ.get(MIRROR_TOKEN)
        self._server = BoundedServer(
            Address.of(constants.ENDPOINT if address is None else address), limits or Limits(), token
        )
        self.address = self._server.address

    def listing(self, repo: str, revision: str) -> tuple[str, Mapping[str, ListedFile]]:
        where = f"{self.address}/{repo}"
        found = _ask(self._server, f"api/models/{repo}/revision/{quote(revision, safe='')}", {"blobs": "true"}, where)
        commit = found.get("sha")
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise _odd(f"the commit {commit!r}", where)
        entries = []
        for entry in _entries(found.get("siblings"), where):
            lfs = entry.get("lfs")
            if lfs is not None and not isinstance(lfs, dict):
                raise _odd(f"an entry with {lfs!r} for its large file", where)
            entries.append((entry.get("rfilename"), entry.get("size"), (lfs or {}).get("sha256"), entry.get("blobId")))
        return commit, _files(entries, where)

    def download(self, repo: str, revision: str, path: str, part: Path, size: int, got: Callable[[int], None]) -> None:
        self._server.file(f"{repo}/resolve/{quote(revision, safe='')}/{quote(path)}", {}, part, size, got)


class ModelScope:
    """modelscope.cn (or what its client is set to); without an address, with the token of who is logged in."""

    name = "modelscope"

    def __init__(self, address: str | None = None, limits: Limits | None = None) -> None:
        try:
            from modelscope_hub.config import HubConfig
        except ImportError as error:
            raise UnavailableError("modelscope-hub is missing", fix="pip install 'bluelm-export[hub]'") from error
        own = HubConfig()
        token = os.environ.get(MIRROR_TOKEN) if address else own.token
        self._server = BoundedServer(
            Address.of(address or own.endpoint or "https://www.modelscope.cn"), limits or Limits(), token
        )
        self.address = self._server.address

    def listing(self, repo: str, revision: str) -> tuple[str, Mapping[str, ListedFile]]:
        where = f"{self.address}/{repo}"
        asked = {"Revision": revision, "Recursive": "True"}
        found = _ask(self._server, f"api/v1/models/{repo}/repo/files", asked, where)
        data = found.get("Data")
        entries = _entries(data.get("Files") if isinstance(data, dict) else data, where)
        if len(entries) >= TRUNCATED:
            raise InputError(f"the hub lists no more than {TRUNCATED} files of a model", where=where)
        blobs = [entry for entry in entries if entry.get("Type") != "tree"]
        return revision, _files(
            [(file.get("Path"), file.get("Size"), file.get("Sha256"), None) for file in blobs], where
        )

    def download(self, repo: str, revision: str, path: str, part: Path, size: int, got: Callable[[int], None]) -> None:
        asked = {"Revision": revision, "FilePath": path}
        self._server.file(f"api/v1/models/{repo}/repo", asked, part, size, got)


HUBS: dict[str, Callable[[str | None, Limits | None], Hub]] = {"huggingface": HuggingFace, "modelscope": ModelScope}


def _ask(server: BoundedServer, path: str, parameters: Mapping[str, str], where: str) -> dict[str, Any]:
    try:
        return server.ask(path, parameters)
    except Absent:
        fix = "check the name and --revision; a gated or private model needs a login"
        raise InputError("the hub has no such model or revision", where=where, fix=fix) from None


def _entries(found: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or len(found) > MAX_FILES:
        raise _odd("no list of files" if not isinstance(found, list) else f"{len(found)} files", where)
    for entry in found:
        if not isinstance(entry, dict):
            raise _odd(f"{entry!r} for a file", where)
    return found


def _files(entries: Sequence[tuple[object, object, object, object]], where: str) -> dict[str, ListedFile]:
    """(path, size, SHA-256 or None, git's SHA-1 or None) of each file, held against what they can be."""
    files: dict[str, ListedFile] = {}
    for path, size, sha256, git_sha1 in entries:
        if not isinstance(path, str) or path in files:
            raise _odd(f"{path!r} for a file" if not isinstance(path, str) else f"{path!r} twice", where)
        if type(size) is not int or not 0 <= size <= LARGEST:
            raise _odd(f"{size!r} for the size of {path!r}", where)
        sha256, git_sha1 = _digest(sha256, 64, path, where), _digest(git_sha1, 40, path, where)
        if sha256 is None and git_sha1 is None:
            raise _odd(f"no digest for {path!r}", where)
        files[path] = ListedFile(size, sha256, None if sha256 else git_sha1)
    check_names(files, where)
    return files


def _digest(value: object, digits: int, path: str, where: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", value):
        raise _odd(f"{value!r} for a digest of {path!r}", where)
    return value.lower()


def _odd(what: str, where: str) -> InputError:
    cut = what if len(what) <= 200 else f"{what[:200]}…"
    return InputError(f"the hub names {cut}", where=where, fix="is that the address of a hub?")
