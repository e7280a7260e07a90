"""Names that another system would read differently, and places that hold something of a user's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bluelm.errors import InputError
from bluelm.trust.paths import check_name, check_names
from export.bundle import build
from export.bundle.android.apk import RESERVE
from export.bundle.build import Input
from export.bundle.manifest import Format
from export.bundle.zip32 import BytesSource
from tests.support import bundles
from tests.support.bundles import FORMATS

COLLIDE = (
    ("artifact/Weights.bin",),
    ("Artifact/more.bin",),
    ("ARTIFACT",),
    ("artifact/caf\u00e9", "artifact/cafe\u0301"),
    ("stra\u00dfe", "STRASSE"),
    ("Manifest.json",),
    ("MODEL.SIG",),
)
RESERVED = (
    "con",
    "artifact/NUL.txt",
    "aux .bin",
    "Com1",
    "lpt\u00b9.x",
    "conin$",
    "x.",
    "x ",
    "a./b",
    "a?b",
    "a<b",
    "a|b",
)


@pytest.mark.parametrize("kind", FORMATS)
def test_names_that_collide_or_are_reserved_are_refused(
    kind: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `bundle`, which writes nothing, and by `verify`, where another tool packed and signed them."""
    signing = bundles.development_keys(tmp_path)
    cases = (*COLLIDE, *((name,) for name in RESERVED)) if kind == "folder" else (COLLIDE[0], COLLIDE[3], ("nul",))
    for number, extra in enumerate(cases):
        files = bundles.FILES | dict.fromkeys(extra, b"x")
        out = tmp_path / f"x{number}"
        with pytest.raises(InputError, match=r"one name on systems|reserved on Windows"):
            bundles.make(kind, out, signing, files)
        assert not list(tmp_path.glob(f"x{number}*"))
    with monkeypatch.context() as patch:
        patch.setattr(build, "check_names", lambda *_: None)
        made = bundles.make(kind, tmp_path / "theirs", signing, bundles.FILES | {"artifact/WEIGHTS.bin": b"x"})
        build.verify(made)
    with pytest.raises(InputError, match=r"WEIGHTS\.bin.* one name"):
        build.verify(made)


def test_names_that_no_system_confuses() -> None:
    check_names(
        ["a/b", "a/c", "ab", "artifact/模型.bin", "contents", "com10", "nul1/x", ".gitignore", "a b", "console.txt"]
    )
    for bad in (["a", "a/b"], ["A/b", "a"], ["模/a", "模/A"]):
        with pytest.raises(InputError, match="one name"):
            check_names(bad)
    for name in RESERVED:
        with pytest.raises(InputError, match="reserved"):
            check_name(name)


@pytest.mark.parametrize("kind", ("apk", "ipa", "folder", "gradle", "xcode", "splits"))
def test_only_an_earlier_bundle_is_replaced(kind: str, tmp_path: Path) -> None:
    signing = bundles.development_keys(tmp_path)
    (tmp_path / "out").mkdir()

    def make(files: dict[str, bytes] | None = None) -> Path:
        if kind != "splits":
            return bundles.make(kind, tmp_path / "out" / "x", signing, files)  # pyright: ignore[reportArgumentType]
        given = bundles.FILES if files is None else files
        inputs = [Input(path, "file", BytesSource(data)) for path, data in given.items()]
        options = build.Options(cap=RESERVE + 80_000)
        return build.make(bundles.draft("apk"), inputs, signing, tmp_path / "out" / "x", options)

    made = make()
    again = make(bundles.FILES | {"artifact/new.bin": b"new"})  # an earlier bundle gives way
    assert again == made and "artifact/new.bin" in build.verify(made).sources
    shutil.copytree(made, tmp_path / "kept") if made.is_dir() else shutil.copyfile(made, tmp_path / "kept")
    if made.is_dir():
        (made / "mine.txt").write_text("hours of work")
    else:
        made.write_bytes(b"the user's own")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="not replaced") as refused:
        make()
    assert "--out" in str(refused.value)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    shutil.rmtree(made) if made.is_dir() else made.unlink()
    if made.suffix not in (".apk", ".ipa"):
        made.mkdir()  # an empty folder holds nothing to lose
    build.verify(make())
