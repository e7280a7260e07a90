"""Every change of a bundle is found: single bytes, truncations, swaps, additions and removals of files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from bluelm.errors import InputError
from export.bundle import build
from export.bundle.manifest import Format
from tests import bundles

FORMATS: tuple[Format, ...] = ("apk", "ipa", "folder", "gradle", "xcode")
Made = Callable[[Format], Path]
CHANGES = 200  # a format: 1,000 in all


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


def copied(path: Path, folder: Path) -> Path:
    target = folder / path.name
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copyfile(path, target)
    return target


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_changed_byte_is_found(kind: Format, made: Made, tmp_path: Path) -> None:
    path = copied(made(kind), tmp_path)
    build.verify(path)
    generator = random.Random(f"bytes of {kind}")
    missed = []
    for _ in range(CHANGES):
        file = generator.choice(files(path))
        place, value = generator.randrange(file.stat().st_size), generator.randrange(1, 256)
        with file.open("r+b") as stream:
            stream.seek(place)
            old = stream.read(1)
            stream.seek(place)
            stream.write(bytes([old[0] ^ value]))
        if not found(path):
            missed.append((file.name, place, value))
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(old)
    assert missed == []
    build.verify(path)


@pytest.mark.parametrize("kind", ("apk", "ipa"))
def test_every_byte_outside_the_contents_is_found(kind: Format, made: Made, tmp_path: Path) -> None:
    """Headers, directory, signing block and Mach-O headers are small beside the contents: try more."""
    path = copied(made(kind), tmp_path)
    raw = path.read_bytes()
    start = raw.index(bundles.FILES["artifact/weights.bin"])
    generator = random.Random(f"structure of {kind}")
    tail = range(start + len(bundles.FILES["artifact/weights.bin"]), len(raw))
    for place in [*generator.sample(range(start), 100), *generator.sample(tail, 200)]:
        changed = bytearray(raw)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        assert found(path), place


@pytest.mark.parametrize("kind", FORMATS)
def test_truncations_and_additions_of_bytes_are_found(kind: Format, made: Made, tmp_path: Path) -> None:
    generator = random.Random(f"cuts of {kind}")
    path = copied(made(kind), tmp_path)
    for _ in range(10):
        file = generator.choice(files(path))
        raw = file.read_bytes()
        for changed in (raw[: generator.randrange(len(raw))], raw + b"\0", b"\0" + raw):
            file.write_bytes(changed)
            assert found(path), file
        file.write_bytes(raw)
    build.verify(path)


def _swap(path: Path) -> None:
    weights, tokenizer = sorted(path.rglob("weights.bin"))[0], sorted(path.rglob("tokenizer.model"))[0]
    a, b = weights.read_bytes(), tokenizer.read_bytes()
    weights.write_bytes(b)
    tokenizer.write_bytes(a)


def _rename(path: Path) -> None:
    weights = sorted(path.rglob("weights.bin"))[0]
    weights.rename(weights.with_name("weights2.bin"))


@pytest.mark.parametrize("kind", ("folder", "gradle", "xcode"))
@pytest.mark.parametrize(
    "change",
    [
        _swap,
        _rename,
        lambda path: sorted(path.rglob("weights.bin"))[0].unlink(),
        lambda path: (path / "extra.txt").write_text("x"),
        lambda path: sorted(path.rglob("model.sig"))[0].with_name(".gitignore").write_text("x"),
        lambda path: (path / "link").symlink_to("/etc/passwd"),
        lambda path: sorted(path.rglob("model.sig"))[0].unlink(),
    ],
)
def test_swaps_additions_and_removals_of_files_are_found(
    kind: Format, change: Callable[[Path], object], made: Made, tmp_path: Path
) -> None:
    path = copied(made(kind), tmp_path)
    change(path)
    assert found(path)


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
