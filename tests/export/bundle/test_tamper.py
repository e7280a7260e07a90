"""Every change of a bundle is found, in every format; a share of benchmarks/tamper.py at every run."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks.tamper import ACCEPTED, FOUND, Bench
from bluelm.errors import InputError
from bluelm.trust import certificates
from export.bundle import build, keys
from export.bundle.manifest import Format
from tests.packages import need
from tests.support import bundles
from tests.support.tampering.case import FORMATS, Case, copied
from tests.support.tampering.table import TAMPERINGS, tamper

Made = Callable[[Format], Path]
DRAWN = 10  # of each format, behind one of every tampering


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle of each format, made once."""
    folder = tmp_path_factory.mktemp("bundles")
    signing = bundles.development_keys(folder)
    return cache(lambda each: bundles.make(each, folder / each, signing))


def found(path: Path) -> bool:
    try:
        build.verify(path)
    except InputError:
        return True
    return False


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    need("clang-19", "lld-19")
    return Bench.make(tmp_path_factory.mktemp("tampering"))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_tampering_is_found(kind: str, bench: Bench) -> None:
    """By `verify --certificate OWNER`, with exit code 2 and no other error; but for what no bundle holds."""
    kinds = [what for what in TAMPERINGS if kind in what.kinds]
    drawn = random.Random(kind).choices(kinds, [what.weight for what in kinds], k=DRAWN)
    for number, what in enumerate([*kinds, *drawn]):
        expected = ACCEPTED if what.harmless else FOUND
        assert bench.trial(kind, what, f"{number}") == expected, (what.name, number)


def test_every_format_is_tampered_with(bench: Bench) -> None:
    """The bundles are what they are called, and the tamperings change them."""
    assert {path.suffix for path in bench.made.values()} == {".apk", ".ipa", ""}
    assert len(list(bench.made["split apks"].glob("split_*.apk"))) >= 2
    for kind, path in bench.made.items():
        assert bench.answer(path) == ACCEPTED, kind
        for what in (each for each in TAMPERINGS if kind in each.kinds and not each.harmless):
            copy = copied(path, bench.place / "twice")
            case = Case(copy, kind, random.Random(what.name), bench.owner, bench.attacker)
            changed = tamper(case, what)
            assert changed.name != path.name or content(changed) != content(path), what.name


def test_a_damaged_certificate_is_an_error_of_ours(tmp_path: Path) -> None:
    """The library reads names and days only when asked: each byte of a certificate damaged, each in three ways."""
    key = bundles.development_keys(tmp_path).model.certificate
    der, refused = key.public_bytes(keys.serialization.Encoding.DER), 0
    for place in range(len(der)):
        for value in (0x80, 0x01, 0xFF):
            changed = bytearray(der)
            changed[place] ^= value
            pem = ssl.DER_cert_to_PEM_cert(bytes(changed)).encode()
            try:
                found = keys.load_certificate(pem, "x")
                certificates.check(found)
                assert keys.subject(found) is not None and keys.is_self_signed(found) in (True, False)
            except InputError:
                refused += 1
    assert refused > len(der)


def content(path: Path) -> dict[str, object]:
    """What lies there: bytes by name, or what a path is that is no file."""
    paths = [path] if path.is_file() else sorted(path.rglob("*"))
    return {
        str(each.relative_to(path.parent)): each.read_bytes()
        if each.is_file() and not each.is_symlink()
        else each.lstat().st_mode
        for each in paths
    }


@pytest.mark.parametrize("kind", ("apk", "ipa"))
def test_every_byte_outside_the_contents_is_found(kind: Format, made: Made, tmp_path: Path) -> None:
    """Headers, directory, signing block and Mach-O headers are small beside the contents: try more."""
    path = copied(made(kind), tmp_path / "copy")
    raw = path.read_bytes()
    start = raw.index(bundles.FILES["artifact/weights.bin"])
    generator = random.Random(f"structure of {kind}")
    tail = range(start + len(bundles.FILES["artifact/weights.bin"]), len(raw))
    for place in [*generator.sample(range(start), 100), *generator.sample(tail, 200)]:
        changed = bytearray(raw)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        assert found(path), place


@pytest.mark.parametrize("kind", ("apk", "ipa"))
def test_files_of_another_bundle_are_found(kind: Format, tmp_path: Path) -> None:
    """A package rebuilt by the same key around other contents does not carry the old manifest's signature."""
    signing = bundles.development_keys(tmp_path)
    one = bundles.make(kind, tmp_path / "one", signing)
    other = dict(bundles.FILES) | {"artifact/weights.bin": b"other"}
    two = bundles.make(kind, tmp_path / "two", signing, other)
    build.verify(two)
    a, b = one.read_bytes(), two.read_bytes()
    two.write_bytes(a[: len(a) // 2] + b[len(b) // 2 :])
    assert found(two)


@pytest.mark.parametrize("name", ["model.sig", "signer.pem", "manifest.json", "artifact/weights.bin", "extra.bin"])
def test_sparse_files_are_not_read(name: str, made: Made, tmp_path: Path) -> None:
    """128 GB that take no room on a disk: hashing them would take minutes."""
    path = copied(made("folder"), tmp_path / "copy") / name
    with path.open("ab") as file:
        file.truncate(128 << 30)
    if name == "extra.bin":
        path.unlink()
        with (copied(made("gradle"), tmp_path / "g") / name).open("wb") as file:
            file.truncate(128 << 30)
        path = tmp_path / "g" / made("gradle").name / name
    root = path.parents[1] if name.startswith("artifact") else path.parent
    with pytest.raises(InputError):
        build.verify(root)
