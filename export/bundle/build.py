"""Make a bundle of any format from a manifest's draft and files; verify any."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bluelm.errors import InputError
from bluelm.system.progress import Progress, Silent
from bluelm.trust import certificates
from bluelm.trust.paths import check_names
from export.bundle import folder, keys, payload, project, runner
from export.bundle.android import apk
from export.bundle.apple import ipa
from export.bundle.manifest import BundleManifest, Format
from export.bundle.zip32 import Contents

# Where the payload lies in the formats that are folders.
HOMES: dict[Format, str] = {"folder": "", "gradle": "modelpack/src/main/assets/model", "xcode": "BlueLMChat/Model"}


@dataclass(frozen=True)
class Input:
    """One file to pack: its path in the payload, what it is for, its contents, their SHA-256 where it is
    known.
    """

    path: str
    role: str
    source: Contents
    sha256: str | None = None


@dataclass(frozen=True)
class Options:
    """How to wrap.

    Attributes:
        runner: the user's app for an IPA.
        cap: bytes of payload in one APK.
    """

    runner: Path | None = None
    cap: int = apk.CAP


def make(
    draft: BundleManifest,
    inputs: Sequence[Input],
    signing: payload.Keys,
    out: Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the bundle of `draft.format` at `out`, with the format's suffix, all or nothing.

    Args:
        draft: manifest.json without files, container and signing.

    Returns:
        The file or folder that was written.

    Raises:
        InputError: the place is taken by something other than an intact bundle of ours; names that collide.
        TargetError, UnavailableError: see the formats.
    """
    options = options or Options()
    package = signing.package.certificate if draft.format == "apk" else None
    update = {"signing": payload.signing_of(signing.model.certificate, package)}
    draft = draft.model_copy(update=update)
    ordered = sorted(inputs, key=lambda i: i.path)
    return _WRITERS[draft.format](_Job(draft, ordered, signing, out, options, progress or Silent()))


@dataclass(frozen=True)
class _Job:
    """One bundle to write: the arguments of `make`, inputs in the order of their paths."""

    draft: BundleManifest
    inputs: Sequence[Input]
    signing: payload.Keys
    out: Path
    options: Options
    progress: Progress

    @property
    def paths(self) -> list[str]:
        return [each.path for each in self.inputs]


def _measure(job: _Job, cuts: Mapping[str, list[int]]) -> list[payload.Content]:
    contents: list[payload.Content] = []
    with job.progress.task("read and hash", total=len(job.inputs)) as task:
        for each in job.inputs:
            found = payload.measure(each.path, each.role, each.source, cuts.get(each.path, ()))
            if each.sha256 not in (None, found.sha256):
                fix = "run bluelm-export again"
                raise InputError("the file was changed since it was made", where=each.path, fix=fix)
            contents.append(found)
            task.advance(note=each.path)
    return contents


def _apk(job: _Job) -> Path:
    places = apk.plan({each.path: each.source.size for each in job.inputs}, job.options.cap)
    _spare(apk.target_of(job.out, places))
    contents = _measure(job, {path: apk.cuts(placed) for path, placed in places.items()})
    around = apk.container(job.draft.application, places)
    _check_names(job.draft.format, job.paths, around)
    whole = payload.assemble(job.draft, contents, job.signing, around, lambda c: apk.pieces(places[c.path]))
    return apk.write(whole, places, job.out, job.signing.package)


def _ipa(job: _Job) -> Path:
    _spare(job.out.with_name(f"{job.out.name}.ipa"))
    draft, own = job.draft, job.options.runner
    app = runner.of_app(own) if own else runner.build(draft.requirements.min_os)
    if app.compiler:
        draft = draft.model_copy(update={"producers": {**draft.producers, "clang": app.compiler}})
    shell = ipa.app_of(app, draft)
    _check_names(draft.format, job.paths, shell.container())
    whole = payload.assemble(draft, _measure(job, {}), job.signing, shell.container())
    return ipa.write(whole, shell, job.out)


def _folder(job: _Job) -> Path:
    target = job.out.with_name(f"{job.out.name}-{job.draft.format}")
    _spare(target)
    around = {} if job.draft.format == "folder" else project.render(job.draft)
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in around.items()}
    _check_names(job.draft.format, job.paths, digests)
    whole = payload.assemble(job.draft, _measure(job, {}), job.signing, digests)
    return folder.write(whole, target, HOMES[job.draft.format], around)


def _check_names(format_: Format, paths: Iterable[str], container: Iterable[str], where: Path | None = None) -> None:
    """The payload's names and those around it, as they lie together."""
    home = {**HOMES, "apk": "base/assets", "ipa": ipa.HOME.rstrip("/")}[format_]
    check_names([*container, *(f"{home}/{path}" if home else path for path in (*paths, *payload.OWN))], where)


def _spare(target: Path) -> None:
    """Make sure that nothing of a user's would be replaced: a bundle that was not touched since it was made may be.

    Raises:
        InputError: anything else lies there.
    """
    if not (target.exists() or target.is_symlink()) or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        _read(target)
    except InputError as error:
        problem = "what lies there is no bundle of ours as it was made, so it is not replaced"
        raise InputError(problem, where=target, fix="name another place with --out, or move it away") from error


_WRITERS: dict[Format, Callable[[_Job], Path]] = {
    "apk": _apk,
    "ipa": _ipa,
    "gradle": _folder,
    "xcode": _folder,
    "folder": _folder,
}


@dataclass(frozen=True)
class Verified(payload.CheckedPayload):
    """A bundle whose every byte was checked.

    Attributes:
        notes: what its reader should know.
    """

    notes: tuple[str, ...]


def verify(path: Path, signed_at: datetime | None = None) -> Verified:
    """Check a bundle of any format: structure, alignment, signatures, digests, manifest against content.

    Args:
        signed_at: when the signers' certificates must have been valid; None: now.

    Raises:
        InputError: what is wrong, and where.
    """
    opened = _read(path)
    for certificate in opened.signers:
        certificates.check(certificate, signed_at, path)
    manifest, notes = opened.manifest, []
    _check_names(manifest.format, opened.sources, manifest.container, path)
    if any(keys.is_development(certificate) for certificate in opened.signers):
        notes.append("signed with a development key: this proves integrity, not who made it")
    elif any(keys.is_self_signed(certificate) for certificate in opened.signers):
        notes.append("whoever made the certificate chose the name in it: compare its SHA-256 (--certificate)")
    if not manifest.judgement.passed:
        notes.append("made of a run that failed its budget")
    if manifest.format == "ipa":
        notes.append(ipa.NOTE)
    return Verified(manifest, opened.sources, opened.certificate, opened.package, tuple(notes))


def _read(path: Path) -> payload.CheckedPayload:
    if path.is_symlink():
        raise InputError("a symbolic link is not followed", where=path, fix="name the bundle itself")
    if not path.exists():
        raise InputError("there is no such bundle", where=path)
    if path.is_file():
        kind = path.suffix.lower()
        if kind == ".apk":
            return _of_format(apk.verify(path), "apk", path)
        if kind == ".ipa":
            return _of_format(ipa.verify(path), "ipa", path)
        raise InputError(f"unknown kind of bundle {kind!r}", where=path, fix="an .apk, an .ipa or a folder")
    if (path / "base.apk").exists():
        return _of_format(apk.verify(path), "apk", path)
    kind = folder.find_home(path, HOMES)
    if kind is None:
        fix = "name what `bluelm-export bundle` made; to check a checkpoint, add --manifest, --public-key or both"
        raise InputError("the folder is not a bundle: it holds no manifest.json", where=path, fix=fix)
    return _of_format(folder.verify(path, HOMES[kind]), kind, path)


def _of_format(found: payload.CheckedPayload, expected: Format, path: Path) -> payload.CheckedPayload:
    if found.manifest.format != expected:
        raise InputError(f"the manifest says {found.manifest.format}, the bundle is {expected}", where=path)
    return found
