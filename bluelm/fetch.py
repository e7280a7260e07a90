"""Fetch a checkpoint from Hugging Face or ModelScope, resumable, every file checked against the hub's
digests.

The list of files and their digests comes from the hub; the bytes may come from a mirror. What the mirror
changed, dropped or added is named file by file. Python files are never fetched, pickles only where there is
nothing else.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bluelm.errors import InputError, UnavailableError
from bluelm.files import sha256
from bluelm.manifest import Difference, FolderManifest, Origin, report
from bluelm.progress import Progress, Silent
from bluelm.safety import check_folder

SKIPPED = (".py", ".gitattributes", ".gitignore")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx")
_TEMPORARY = (".cache", "._____temp", ".mdl", ".msc", ".mv")  # what the hubs' clients leave in a folder


@dataclass(frozen=True)
class Listed:
    """What a hub says of one file: bytes, and the SHA-256 of its contents or the SHA-1 of its git blob."""

    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None


class Hub(Protocol):
    """One hub, or a mirror of it."""

    name: str
    address: str

    def listing(self, repo: str, revision: str) -> tuple[str, Mapping[str, Listed]]:
        """(resolved revision, files)."""
        ...

    def download(self, repo: str, revision: str, path: str, folder: Path) -> None: ...


class HuggingFace:
    """huggingface_hub's client; it resumes what was begun in the same folder."""

    name = "huggingface"

    def __init__(self, address: str | None = None) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import constants, errors  # submodules: not there before they are imported
        except ImportError as error:
            raise UnavailableError("huggingface_hub is missing", fix="pip install 'bluelm-export[hub]'") from error
        self._client: Any = huggingface_hub
        self._errors: Any = errors
        self.address = (address or constants.ENDPOINT).rstrip("/")

    def listing(self, repo: str, revision: str) -> tuple[str, Mapping[str, Listed]]:
        api = self._client.HfApi(endpoint=self.address)
        info = self._call(lambda: api.model_info(repo, revision=revision, files_metadata=True), repo)
        files = {}
        for file in info.siblings or []:
            lfs = file.lfs.sha256 if file.lfs else None
            files[file.rfilename] = Listed(file.size, lfs, None if lfs else file.blob_id)
        return info.sha or revision, files

    def download(self, repo: str, revision: str, path: str, folder: Path) -> None:
        get = self._client.hf_hub_download
        self._call(
            lambda: get(repo, path, revision=revision, local_dir=folder, endpoint=self.address),
            f"{self.address}/{repo}/{path}",
        )

    def _call(self, work: Callable[[], Any], where: str) -> Any:
        try:
            return work()
        except (self._errors.EntryNotFoundError, FileNotFoundError) as error:
            raise Missing(where) from error
        except (
            self._errors.RepositoryNotFoundError,
            self._errors.RevisionNotFoundError,
        ) as error:
            fix = "check the name and --revision; a gated model needs `hf auth login`"
            raise InputError("the hub has no such model or revision", where=where, fix=fix) from error
        except Exception as error:  # the HTTP client's own classes differ between versions of the library
            raise _unreachable(self.address, error) from error


class ModelScope:
    """ModelScope's client (modelscope-hub)."""

    name = "modelscope"

    def __init__(self, address: str | None = None) -> None:
        try:
            from modelscope_hub import errors
            from modelscope_hub.api import HubApi
        except ImportError as error:
            raise UnavailableError("modelscope-hub is missing", fix="pip install 'bluelm-export[hub]'") from error
        self.address = (address or "https://www.modelscope.cn").rstrip("/")
        self._errors: Any = errors
        self._api: Any = HubApi(endpoint=self.address)

    def listing(self, repo: str, revision: str) -> tuple[str, Mapping[str, Listed]]:
        found = self._call(lambda: self._api.list_repo_files(repo, "model", revision=revision), repo)
        return revision, {file.path: Listed(file.size, file.sha256) for file in found if not file.is_dir}

    def download(self, repo: str, revision: str, path: str, folder: Path) -> None:
        get = self._api.download_file
        where = f"{self.address}/{repo}/{path}"
        self._call(lambda: get(repo, "model", path, revision=revision, local_dir=folder), where)

    def _call(self, work: Callable[[], Any], where: str) -> Any:
        try:
            return work()
        except self._errors.NotExistError as error:
            raise Missing(where) from error
        except Exception as error:  # the client lets errors of requests and json through
            raise _unreachable(self.address, error) from error


class Missing(InputError):  # noqa: N818  (an answer, told as a difference)
    """A file or a model that the hub or mirror does not have."""

    def __init__(self, where: str) -> None:
        super().__init__("the hub does not have it", where=where, fix="check the name and --revision")


def _unreachable(address: str, error: Exception) -> UnavailableError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    fix = "check the network, or name a mirror with --mirror; what was fetched is kept and resumed"
    return UnavailableError(f"{address} did not answer: {reason}", where=address, fix=fix)


HUBS: dict[str, Callable[[str | None], Hub]] = {"huggingface": HuggingFace, "modelscope": ModelScope}


def wanted(files: Mapping[str, Listed]) -> dict[str, Listed]:
    """Files to fetch: no code, and pickled or foreign weights only when there are no safetensors."""
    safe = any(path.endswith(".safetensors") for path in files)
    skipped = SKIPPED + PICKLED if safe else SKIPPED
    return {path: file for path, file in sorted(files.items()) if not path.lower().endswith(skipped)}


def fetch(
    repo: str,
    out: Path,
    revision: str,
    hub: Hub,
    mirror: Hub | None = None,
    pinned: FolderManifest | None = None,
    progress: Progress | None = None,
) -> FolderManifest:
    """Fetch `repo` at `revision` into `out`; interrupted, the same call goes on where it stopped.

    Args:
        mirror: where the bytes come from; the hub's own server when None.
        pinned: a manifest that the result must equal; with it, `hub` is not asked.

    Returns:
        The manifest of the folder, with its origin.

    Raises:
        InputError: a file differs from the hub's digest or the pinned manifest, is missing, or was added by
            the mirror; each is named, and nothing appears at `out`.
        UnavailableError: hub or mirror cannot be reached.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII):
        raise InputError(f"{repo!r} is no name of a model on a hub", fix="e.g. vivo-ai/BlueLM-7B-Chat")
    if out.exists():
        raise InputError("the output exists", where=out, fix="name another folder, or `bluelm-export verify` it")
    server = mirror or hub
    if pinned is None:
        commit, files = hub.listing(repo, revision)
        files = wanted(files)
    else:
        commit = revision
        files = {path: Listed(file.bytes, file.sha256) for path, file in pinned.files.items()}
    if not files:
        raise InputError("the hub lists no files to fetch", where=f"{hub.address}/{repo}")
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    found = _added(server, repo, commit, files) if server is not hub or pinned else []
    found += _download(server, repo, commit, files, partial, progress or Silent())
    report(found, f"{server.address}/{repo}")
    for name in _TEMPORARY:
        _remove(partial / name)
    check_folder(partial)
    origin = Origin(hub=hub.name, repo=repo, revision=commit, mirror=mirror.address if mirror else None)
    manifest = FolderManifest.of(partial, origin)
    left = sorted(set(manifest.files) - set(files))
    report([Difference(path, "added", "not in the hub's list") for path in left], partial)
    partial.rename(out)
    return manifest


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _added(server: Hub, repo: str, commit: str, files: Mapping[str, Listed]) -> list[Difference]:
    """Files that the mirror offers and the hub or the pinned manifest does not know."""
    _, offered = server.listing(repo, commit)
    extra = sorted(set(wanted(offered)) - set(files))
    return [Difference(path, "added", f"offered by {server.address}, unknown to the hub") for path in extra]


def _download(
    server: Hub, repo: str, commit: str, files: Mapping[str, Listed], folder: Path, progress: Progress
) -> list[Difference]:
    found: list[Difference] = []
    with progress.task("fetch", total=len(files)) as task:
        for path, listed in files.items():
            target = folder / path
            if not target.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"the hub names {path!r}, a path out of the folder", where=server.address)
            if not (target.is_file() and matches(target, listed) is None):
                target.unlink(missing_ok=True)
                difference = _fetch_one(server, repo, commit, path, listed, folder)
                found += [difference] if difference else []
            task.advance(note=path)
    return found


def _fetch_one(server: Hub, repo: str, commit: str, path: str, listed: Listed, folder: Path) -> Difference | None:
    try:
        server.download(repo, commit, path, folder)
    except Missing:
        return Difference(path, "missing", f"{server.address} does not have it")
    reason = matches(folder / path, listed)
    if reason is None:
        return None
    (folder / path).unlink(missing_ok=True)
    return Difference(path, "changed", reason)


def matches(path: Path, listed: Listed) -> str | None:
    """None when the file is what the hub lists, else what differs."""
    if not path.is_file():
        return "no regular file arrived"
    size = path.stat().st_size
    if listed.size is not None and size != listed.size:
        return f"{size} bytes, the hub lists {listed.size}"
    if listed.sha256 is not None:
        return None if sha256(path) == listed.sha256 else "its SHA-256 is not the hub's"
    if listed.git_sha1 is not None:
        return None if git_blob(path) == listed.git_sha1 else "its git SHA-1 is not the hub's"
    return "the hub lists no digest for it"


def git_blob(path: Path) -> str:
    """SHA-1 of the file as a git blob, which is how hubs name small files."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
