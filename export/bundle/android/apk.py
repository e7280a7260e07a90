"""APK model packs without code: one APK, or split APKs where the model passes the limit of one.

    AndroidManifest.xml · assets/<payload file>, stored and aligned to 16 KiB, so that an app can map it

Devices refuse an APK of 2 GiB and more. A file that does not fit is cut; manifest.json says where each piece
lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bluelm.errors import InputError
from bluelm.system.files import atomic_file, atomic_folder
from export.bundle import keys, payload
from export.bundle.android import axml
from export.bundle.android import signing as apk_signing
from export.bundle.manifest import FILE, Application, BundleManifest, SplitPiece
from export.bundle.zip32 import Archive, Contents, Entry, FileSource

ALIGNMENT = 16384  # pages of Android 15's 16 KiB devices
CAP = 2**31 - 2**26  # bytes of payload in one APK
RESERVE = 2**25  # of the base, for the payload's own files and headers
BASE = "base"
MIN_SDK, TARGET_SDK = 24, 35  # 24: the first Android with signature scheme v2
MANIFEST = "AndroidManifest.xml"
ASSETS = "assets/"


@dataclass(frozen=True)
class Placed:
    """Some bytes of one payload file in one APK of the set."""

    apk: str
    entry: str
    size: int


def plan(sizes: Mapping[str, int], cap: int = CAP, reserve: int = RESERVE) -> dict[str, list[Placed]]:
    """Where each file goes: into the base while it lasts, then into splits `model1`, `model2`, …, cut where
    needed.
    """
    apk, free, number = BASE, cap - reserve, 0
    places: dict[str, list[Placed]] = {}
    for path, size in sizes.items():
        need = size + 2 * ALIGNMENT
        if need > free and size <= cap - reserve:
            number += 1
            apk, free = f"model{number}", cap - reserve
        if need <= free:
            places[path] = [Placed(apk, ASSETS + path, size)]
            free -= need
            continue
        places[path], left = [], size
        while left:
            number += 1
            apk, take = f"model{number}", min(left, cap - reserve)
            places[path].append(Placed(apk, f"{ASSETS}{path}.part{len(places[path]) + 1}", take))
            left, free = left - take, cap - reserve - take
    return places


def cuts(places: Sequence[Placed]) -> list[int]:
    """Sizes of a file's parts."""
    return [placed.size for placed in places]


def pieces(places: Sequence[Placed]) -> tuple[SplitPiece, ...]:
    """What manifest.json says of a file's places; nothing when it lies whole in the base."""
    if len(places) == 1 and places[0].apk == BASE:
        return ()
    return tuple(SplitPiece(apk=p.apk, entry=p.entry, bytes=p.size) for p in places)


def app_manifest(application: Application, apk: str) -> bytes:
    """AndroidManifest.xml of the base or of a split."""
    if apk == BASE:
        names = (application.version_name, application.label)
        return axml.pack_manifest(application.id, application.version_code, *names, MIN_SDK, TARGET_SDK)
    return axml.split_manifest(application.id, application.version_code, apk, MIN_SDK, TARGET_SDK)


def container(application: Application, places: Mapping[str, Sequence[Placed]]) -> dict[str, str]:
    """SHA-256 of what the APKs hold besides the payload."""
    apks = {BASE, *(placed.apk for each in places.values() for placed in each)}
    return {f"{apk}/{MANIFEST}": hashlib.sha256(app_manifest(application, apk)).hexdigest() for apk in sorted(apks)}


def write(whole: payload.Payload, places: Mapping[str, Sequence[Placed]], out: Path, key: keys.SigningKey) -> Path:
    """Write `out`.apk, or the folder `out` of split APKs, all or nothing.

    Returns:
        The file or folder.
    """
    members: dict[str, list[tuple[str, payload.Content, payload.PayloadPart]]] = {BASE: []}
    for content in whole.contents:
        placed = places.get(content.path) or [Placed(BASE, ASSETS + content.path, content.size)]
        for place, part in zip(placed, content.parts, strict=True):
            members.setdefault(place.apk, []).append((place.entry, content, part))
    target = target_of(out, places)
    if len(members) == 1:
        with atomic_file(target) as temporary:
            _write_one(temporary, whole.manifest.application, BASE, members[BASE], key)
        return target
    with atomic_folder(target) as temporary:
        for apk, entries in members.items():
            _write_one(temporary / file_name(apk), whole.manifest.application, apk, entries, key)
    return target


def target_of(out: Path, places: Mapping[str, Sequence[Placed]]) -> Path:
    """The file of one APK, or the folder of splits."""
    split = any(placed.apk != BASE for each in places.values() for placed in each)
    return out.with_name(f"{out.name}{'-apks' if split else '.apk'}")


def file_name(apk: str) -> str:
    return "base.apk" if apk == BASE else f"split_{apk}.apk"


def _write_one(
    path: Path,
    application: Application,
    apk: str,
    members: Sequence[tuple[str, payload.Content, payload.PayloadPart]],
    key: keys.SigningKey,
) -> None:
    head = payload.of_bytes(MANIFEST, "", app_manifest(application, apk))
    whole = [(MANIFEST, head, head.parts[0]), *members]
    entries = [Entry(name, part.size, part.crc) for name, _, part in whole]
    sources = [content.part_source(part) for _, content, part in whole]
    apk_signing.write_signed(path, entries, sources, ALIGNMENT, key)


@dataclass(frozen=True)
class Joined:
    """The pieces of a file, one behind the other."""

    parts: tuple[FileSource, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def pieces(self) -> Iterator[bytes]:
        for part in self.parts:
            yield from part.pieces()


def verify(path: Path) -> payload.CheckedPayload:
    """Check one APK or a folder of splits: signatures, alignment, manifests, then the payload.

    Raises:
        InputError: what is wrong, and where.
    """
    files = [path] if path.is_file() else _split_files(path)
    opened = {apk_of(file, path): apk_signing.verify_apk(file, ALIGNMENT) for file in files}
    base, signer = opened[BASE]
    manifest = BundleManifest.decode(base.read(ASSETS + FILE), path)
    sources, used = _payload_sources(manifest, {name: archive for name, (archive, _) in opened.items()}, path)
    found: dict[str, str] = {}
    for name, (archive, certificate) in opened.items():
        if certificate != signer:
            raise InputError("the APK is signed with another key than the base of its set", where=archive.path)
        if any(entry.mode for entry in archive.entries):
            raise InputError("an entry has permissions that no APK of this tool has", where=archive.path)
        for entry in set(archive.names()) - used[name]:
            digest = payload.measure(entry, "", archive.source(entry)).sha256
            found[f"{name}/{entry}"] = digest
    return payload.verify(sources, found, path, signer)


def apk_of(file: Path, path: Path) -> str:
    """Name of a split by its file."""
    return BASE if file == path or file.name == "base.apk" else file.stem.removeprefix("split_")


def _split_files(folder: Path) -> list[Path]:
    files = sorted(folder.iterdir())
    strange = [f for f in files if f.is_symlink() or not f.is_file() or f.suffix != ".apk"]
    if strange or not (folder / "base.apk").is_file():
        raise InputError("not a folder of split APKs: base.apk and split_*.apk only", where=(strange or [folder])[0])
    if any(file.name not in (file_name(apk_of(file, folder)),) for file in files):
        raise InputError("a file is not named as a split APK", where=folder)
    return files


def _payload_sources(
    manifest: BundleManifest, archives: Mapping[str, Archive], where: Path
) -> tuple[dict[str, Contents], dict[str, set[str]]]:
    """The payload's files, joined from their pieces, and the entries of each APK that they use."""
    sources: dict[str, Contents] = {}
    used: dict[str, set[str]] = {name: set() for name in archives}
    for path, file in manifest.files.items():
        parts: list[FileSource] = []
        for piece in file.pieces:
            archive = archives.get(piece.apk)
            if archive is None or piece.entry not in archive.data:
                raise InputError(f"{path}: the piece {piece.entry} of {piece.apk} is missing", where=where)
            parts.append(archive.source(piece.entry))
            used[piece.apk].add(piece.entry)
        if parts:
            sources[path] = Joined(tuple(parts))
    for name in archives[BASE].names():
        if name.startswith(ASSETS) and name not in used[BASE]:
            sources[name.removeprefix(ASSETS)] = archives[BASE].source(name)
            used[BASE].add(name)
    return sources, used
