"""Tampering with the manifest, the certificates and the signatures."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from export.bundle import build, folder, keys, mlbom, payload
from export.bundle.android import apk
from export.bundle.android import signing as apk_signing
from export.bundle.manifest import CERTIFICATE, FILE, MLBOM, SIGNATURE, BundleManifest
from export.bundle.zip32 import BytesSource
from tests.support.tampering.case import FOLDERS, WEIGHTS, Case, make

# --- the manifest and the certificates -------------------------------------------------------------------------------


def payload_of(case: Case) -> tuple[payload.CheckedPayload, dict[str, bytes]]:
    """The payload as it was signed."""
    opened = build.verify(case.path)
    return opened, {name: b"".join(source.pieces()) for name, source in opened.sources.items()}


def _leaves(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from _leaves(each, (*way, key))
    if not isinstance(value, dict | list):
        yield way


def _edited(case: Case, raw: bytes) -> BundleManifest:
    """A manifest with one value another one that is valid, too."""
    document = json.loads(raw)
    ways = list(_leaves(document))
    while True:
        changed = json.loads(raw)
        *way, last = case.draw.choice(ways)
        place = changed
        for key in way:
            place = place[key]
        old = place[last]
        if isinstance(old, bool):
            place[last] = not old
        elif isinstance(old, int | float):
            place[last] = old + 1
        elif isinstance(old, str):
            place[last] = case.draw.choice((old[::-1], f"{old}0", "0" * len(old)))
        else:
            continue
        try:
            found = BundleManifest.decode(BundleManifest.model_validate(changed).encode(), case.path)
        except ValueError:
            continue
        except Exception:  # noqa: BLE001 - not a manifest any more: another value
            continue
        if found.encode() != raw:
            return found


def _edit_manifest(also: bool) -> Callable[[Case], None]:
    """One value of manifest.json; with `also`, the bill of materials follows it."""

    def do(case: Case) -> None:
        _, held = payload_of(case)
        manifest = _edited(case, held[FILE])
        _replace(case, {FILE: manifest.encode()} | ({MLBOM: mlbom.encode(manifest)} if also else {}))

    return do


def _replace(case: Case, files: dict[str, bytes]) -> None:
    """Other contents for files of the payload; in an archive the package is signed again by the attacker."""
    if case.kind in FOLDERS:
        for name, data in files.items():
            (case.home / name).write_bytes(data)
        return
    for path in case.files:
        with zipfile.ZipFile(path) as archive:
            held = {info.filename: archive.read(info) for info in archive.infolist()}
        for name, data in files.items():
            for entry in [entry for entry in held if entry.endswith(f"/{name}") and "artifact" not in entry]:
                held[entry] = data
        _pack(case, path, held)


def _pack(case: Case, path: Path, held: dict[str, bytes]) -> None:
    """An archive of the tool's own making, an APK signed by the attacker."""
    from export.bundle import zip32

    contents = [payload.of_bytes("x", "", data) for data in held.values()]
    entries = [
        zip32.Entry(name, content.size, content.parts[0].crc) for name, content in zip(held, contents, strict=True)
    ]
    sources = [BytesSource(data) for data in held.values()]
    if case.kind == "ipa":
        zip32.write_zip(path, entries, sources)
    else:
        apk_signing.write_signed(path, entries, sources, apk.ALIGNMENT, case.attacker.package)


def _certificate(case: Case) -> None:
    """The attacker's certificate in place of the owner's, or beside it."""
    own, his = case.owner.model.certificate_pem, case.attacker.model.certificate_pem
    _replace(case, {CERTIFICATE: case.draw.choice((his, own + his, his + own, own + b"\n", b"# owner\n" + own))})


def _signed_again(lie: str) -> Callable[[Case], None]:
    """All of it made and signed by the attacker, around other weights; `lie`: what his manifest says of the signer."""

    def do(case: Case) -> None:
        digest = keys.fingerprint(case.owner.model.certificate)
        true = payload.signing_of

        def told(*both: Any) -> Any:
            found = true(*both)
            if lie == "owner's":
                return true(case.owner.model.certificate, both[1] and case.owner.package.certificate)
            return found if lie == "none" else found.model_copy(update={lie: digest})

        files = WEIGHTS | {"artifact/weights.bin": case.draw.randbytes(1000)}
        if case.path.is_dir():
            shutil.rmtree(case.path)
        else:
            case.path.unlink()
        with patch.object(payload, "signing_of", told):
            made = make(case.kind, case.path.parent / "his", case.attacker, files)
        made.rename(case.path)

    return do


def _his_signature(case: Case) -> None:
    """model.sig of the attacker over the owner's files, with or without his certificate beside it."""
    _, held = payload_of(case)
    beside = {CERTIFICATE: case.attacker.model.certificate_pem} if case.draw.random() < 0.5 else {}
    held |= beside
    signed = {name: payload.of_bytes(name, "", data).sha256 for name, data in held.items() if name != SIGNATURE}
    from bluelm.trust import signature

    raw = signature.sign(payload.NAME, signed, case.attacker.model_private)
    _replace(case, {**beside, SIGNATURE: raw})


def _rewrapped(case: Case) -> None:
    """The owner's signed payload around which another package lies: the attacker's APK, or a folder."""
    _, held = payload_of(case)
    name = case.path.name
    if case.path.is_dir():
        shutil.rmtree(case.path)
    else:
        case.path.unlink()
    if case.kind == "folder" or (case.kind in ("gradle", "xcode") and case.draw.random() < 0.5):
        path = case.path.with_name("wrapped.apk")
        manifest = BundleManifest.decode(held[FILE], path)
        packed = {apk.MANIFEST: apk.app_manifest(manifest.application, apk.BASE)}
        _pack(replace(case, kind="apk"), path, packed | {f"{apk.ASSETS}{n}": d for n, d in sorted(held.items())})
        path.rename(case.path.with_name(f"{name}.apk"))
    else:
        home = case.draw.choice([home for kind, home in build.HOMES.items() if kind != case.kind])
        folder.extract({n: BytesSource(d) for n, d in held.items()}, case.path.with_name(f"{name}-folder") / home)


def _package_signed_again(case: Case) -> None:
    """The package's own signature by the attacker, every entry as the owner made it."""
    _replace(case, {})
