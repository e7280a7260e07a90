"""Fetch a checkpoint from Hugging Face or ModelScope, resumable, every file checked against the hub's
digests.

The list of files, their sizes and digests come from the hub; the bytes may come from a mirror. What the mirror
changed, dropped or added is named file by file. Python files are never fetched, pickles only where there is
nothing else.

    OUT.partial/   files that are whole and as the hub says
    OUT.parts/     files under way, by the SHA-256 of their path
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bluelm.errors import InputError
from bluelm.system.files import sha256
from bluelm.system.progress import Progress, Silent, Task
from bluelm.trust.hubs import Hub, ListedFile
from bluelm.trust.manifest import PINNED, Difference, FolderManifest, Origin, raise_differences
from bluelm.trust.paths import check_names
from bluelm.trust.safety import check_folder, walk
from bluelm.trust.transfer import Absent, Differs

SKIPPED = (".py", ".gitattributes", ".gitignore", PINNED)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx")
_MB = 10**6


@dataclass(frozen=True)
class Fetched:
    """What lies at the output: its manifest, which is in it too, and the files that the hub lists and that were left
    there."""

    manifest: FolderManifest
    left_out: tuple[str, ...]


def wanted(files: Mapping[str, ListedFile]) -> dict[str, ListedFile]:
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
) -> Fetched:
    """Fetch `repo` at `revision` into `out`; interrupted, the same call goes on where it stopped.

    Args:
        mirror: where the bytes come from; the hub's own server when None.
        pinned: a manifest that the result must equal; with it, `hub` is not asked.

    Raises:
        InputError: a file differs from the hub's size or digest or the pinned manifest, is missing, or was added by
            the mirror; each is named, and nothing appears at `out`. What the hub says is no listing of files that can
            be. The disk has no room for them.
        UnavailableError: hub or mirror cannot be reached, or not within its limits.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII):
        raise InputError(f"{repo!r} is not the name of a model on a hub", fix="e.g. vivo-ai/BlueLM-7B-Chat")
    if not re.fullmatch(r"[\w./+-]{1,200}", revision) or ".." in revision:
        raise InputError(f"{revision!r} is not a revision", fix="name a branch, a tag or a commit with --revision")
    if out.exists():
        raise InputError("the output exists", where=out, fix="name another folder, or `bluelm-export verify` it")
    server = mirror or hub
    if pinned is None:
        commit, listed = hub.listing(repo, revision)
        files = wanted(listed)
    else:
        commit, listed = revision, {}
        files = {path: ListedFile(file.bytes, file.sha256) for path, file in pinned.files.items()}
        check_names(files, "the pinned manifest")
    if not files:
        raise InputError("the hub lists no files to fetch", where=f"{hub.address}/{repo}")
    place = _Place(out)
    place.prepare(files)
    found = _added(server, repo, commit, files) if server is not hub or pinned else []
    found += _download(server, repo, commit, files, place, progress or Silent())
    raise_differences(found, f"{server.address}/{repo}")
    check_folder(place.whole)
    origin = Origin(hub=hub.name, repo=repo, revision=commit, mirror=mirror.address if mirror else None)
    manifest = FolderManifest.of(place.whole, origin)
    place.finish(manifest)
    return Fetched(manifest, tuple(sorted(set(listed) - set(files))))


class _Place:
    """The folders beside an output: `whole` for finished files, `parts` for those under way."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.whole = out.with_name(f"{out.name}.partial")
        self.parts = out.with_name(f"{out.name}.parts")

    def prepare(self, files: Mapping[str, ListedFile]) -> None:
        """Make the folders.

        Raises:
            InputError: what lies there is not of this fetch; there is no room on the disk.
        """
        for folder in (self.whole, self.parts):
            folder.mkdir(parents=True, exist_ok=True)
        there = {name: path.stat().st_size for name, path in walk(self.whole)}
        (self.whole / PINNED).unlink(missing_ok=True)  # of a call that was interrupted at its very end
        foreign = sorted(set(there) - set(files) - {PINNED})
        if foreign:
            names = ", ".join(map(repr, foreign[:5])) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            fix = f"remove {self.whole.name} and {self.parts.name}, or name another --out"
            raise InputError(
                f"an earlier fetch left files that are not of this model: {names}", where=self.whole, fix=fix
            )
        begun = sum(path.stat().st_size for path in (self.part(name) for name in files) if path.is_file())
        needed = sum(file.size for name, file in files.items() if name not in there) - begun
        free = shutil.disk_usage(self.whole).free
        if needed > free:
            problem = f"{needed / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB of the disk are free"
            raise InputError(problem, where=self.out, fix="free some space, or name another --out")

    def part(self, path: str) -> Path:
        return self.parts / hashlib.sha256(path.encode()).hexdigest()

    def finish(self, manifest: FolderManifest) -> None:
        """Let the output appear, with its manifest."""
        manifest.save(self.whole / PINNED)
        self.whole.rename(self.out)
        for part in self.parts.iterdir():
            if re.fullmatch(r"[0-9a-f]{64}", part.name):
                part.unlink()
        if not any(self.parts.iterdir()):
            self.parts.rmdir()


def _added(server: Hub, repo: str, commit: str, files: Mapping[str, ListedFile]) -> list[Difference]:
    """Files that the mirror offers and the hub or the pinned manifest does not know."""
    _, offered = server.listing(repo, commit)
    extra = sorted(set(wanted(offered)) - set(files))
    return [Difference(path, "added", f"offered by {server.address}, unknown to the hub") for path in extra]


def _download(
    server: Hub, repo: str, commit: str, files: Mapping[str, ListedFile], place: _Place, progress: Progress
) -> list[Difference]:
    found: list[Difference] = []
    with progress.task("fetch (MB)", total=max(1, sum(file.size for file in files.values()) // _MB)) as task:
        count = _Count(task)
        for path, listed in files.items():
            target = place.whole / path
            if target.is_file() and matches(target, listed) is None:
                count(listed.size, path)
                continue
            target.unlink(missing_ok=True)
            difference = _fetch_one(server, repo, commit, path, listed, place, count)
            found += [difference] if difference else []
    return found


class _Count:
    """Bytes, told to a task in whole MB."""

    def __init__(self, task: Task) -> None:
        self._task, self._bytes = task, 0

    def __call__(self, size: int, path: str) -> None:
        before, self._bytes = self._bytes // _MB, self._bytes + size
        if self._bytes // _MB > before:
            self._task.advance(self._bytes // _MB - before, note=path)


def _fetch_one(
    server: Hub, repo: str, commit: str, path: str, listed: ListedFile, place: _Place, count: _Count
) -> Difference | None:
    """Bring one file to its place; a part that was begun before and does not fit is fetched anew once."""
    part, target = place.part(path), place.whole / path
    while True:
        begun = part.stat().st_size if part.is_file() else 0
        count(begun, path)
        try:
            server.download(repo, commit, path, part, listed.size, lambda size: count(size, path))
        except Absent:
            part.unlink(missing_ok=True)
            return Difference(path, "missing", f"{server.address} does not have it")
        except Differs as error:
            part.unlink(missing_ok=True)
            return Difference(path, "changed", str(error))
        reason = matches(part, listed)
        if reason is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)
            return None
        part.unlink()
        if not begun:
            return Difference(path, "changed", reason)


def matches(path: Path, listed: ListedFile) -> str | None:
    """None when the file is what the hub lists, else what differs."""
    if not path.is_file():
        return "no regular file arrived"
    size = path.stat().st_size
    if size != listed.size:
        return f"{size} bytes, the hub lists {listed.size}"
    if listed.sha256 is not None:
        return None if sha256(path) == listed.sha256 else "its SHA-256 is not the hub's"
    return None if git_blob(path) == listed.git_sha1 else "its git SHA-1 is not the hub's"


def git_blob(path: Path) -> str:
    """SHA-1 of the file as a git blob, which is how hubs name small files."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
