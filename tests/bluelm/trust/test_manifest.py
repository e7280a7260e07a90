"""Manifests of folders: every digit of a digest counts, every difference is named, in words that say which."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from bluelm.errors import InputError
from bluelm.trust.manifest import (
    MAX_BYTES,
    FolderManifest,
    Origin,
    PinnedFile,
    differences,
    raise_differences,
    verify_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (home / "a.txt").write_text("one")
    (home / "sub" / "b.txt").write_text("three")
    return home


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_folder_as_it_is(folder: Path) -> None:
    found = FolderManifest.of(folder)
    assert found.digests() == {"a.txt": digest("one"), "sub/b.txt": digest("three")}
    assert {name: file.bytes for name, file in found.files.items()} == {"a.txt": 3, "sub/b.txt": 5}
    assert found.digest() == digest(f"{digest('one')} 3 a.txt\n{digest('three')} 5 sub/b.txt\n")
    assert FolderManifest(files=dict(reversed(found.files.items()))).digest() == found.digest()
    verify_folder(folder, found)


@pytest.mark.parametrize("place", range(64))
def test_every_digit_of_a_digest_counts(place: int) -> None:
    right = digest("one")
    wrong = right[:place] + ("0" if right[place] != "0" else "1") + right[place + 1 :]
    (found,) = differences({"a": PinnedFile(bytes=3, sha256=wrong)}, {"a": PinnedFile(bytes=3, sha256=right)})
    assert (found.path, found.kind) == ("a", "changed")
    assert str(found) == f"changed: a (SHA-256 {right[:16]}…, pinned {wrong[:16]}…)"


def test_what_differs_is_told_by_name_in_order() -> None:
    one, two = PinnedFile(bytes=1, sha256=digest("1")), PinnedFile(bytes=2, sha256=digest("1"))
    found = differences({"c": one, "b": one, "a": one, "same": one}, {"d": one, "b": two, "a": one, "same": one})
    assert list(map(str, found)) == [
        "changed: b (2 bytes, 1 in the manifest)",
        "missing: c (1 bytes in the manifest)",
        "added: d (not in the manifest)",
    ]
    assert differences({"a": one}, {"a": one}) == []


def test_a_changed_folder_is_refused_but_for_ignored_files(folder: Path) -> None:
    manifest = FolderManifest.of(folder)
    (folder / "manifest.json").write_text("{}")
    verify_folder(folder, manifest, frozenset({"manifest.json"}))
    with pytest.raises(InputError, match=r"^1 file differs from the manifest:\n  added: manifest\.json"):
        verify_folder(folder, manifest)
    (folder / "a.txt").write_text("two")  # as long as before
    with pytest.raises(InputError, match=r"2 files differ from the manifest:\n  changed: a\.txt"):
        verify_folder(folder, manifest)


def test_fifty_differences_are_shown() -> None:
    pinned = PinnedFile(bytes=1, sha256=digest("1"))
    for count, more in ((50, None), (51, "and 1 more"), (60, "and 10 more")):
        with pytest.raises(InputError) as caught:
            raise_differences(differences({}, {f"{n:03}": pinned for n in range(count)}), "here")
        text = str(caught.value)
        assert text.count("added: ") == min(count, 50)
        assert ("more" in text) == (more is not None)
        assert more is None or more in text
    raise_differences([], "here")


def test_a_saved_manifest_is_read_back(folder: Path, tmp_path: Path) -> None:
    origin = Origin(hub="hf", repo="a/b", revision="c")
    saved = FolderManifest.of(folder, origin)
    saved.save(tmp_path / "m.json")
    text = (tmp_path / "m.json").read_text()
    assert FolderManifest.open(tmp_path / "m.json") == saved
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"
    assert json.loads(text)["origin"] == {"hub": "hf", "repo": "a/b", "revision": "c"}  # no mirror: none was used
    assert "origin" not in json.loads(FolderManifest.of(folder).model_dump_json(exclude_none=True))


@pytest.mark.parametrize("name", ["/a", "a//b", "./a", "a/..", "../a", "a\\b", ""])
def test_paths_outside_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    text = {"format": "bluelm-export/folder-manifest/1", "files": {name: {"bytes": 1, "sha256": "0" * 64}}}
    (tmp_path / "m.json").write_text(json.dumps(text))
    with pytest.raises(InputError, match=r"not a manifest: files: .*not a path inside the folder"):
        FolderManifest.open(tmp_path / "m.json")
    text["files"] = {"..a/b.": {"bytes": 0, "sha256": "f" * 64}}
    (tmp_path / "m.json").write_text(json.dumps(text))
    assert list(FolderManifest.open(tmp_path / "m.json").files) == ["..a/b."]


@pytest.mark.parametrize("pinned", [{"bytes": -1, "sha256": "0" * 64}, {"bytes": 1, "sha256": "0" * 63},
                                    {"bytes": 1, "sha256": "0" * 65}, {"bytes": 1, "sha256": "A" * 64},
                                    {"bytes": 1, "sha256": "0" * 64, "more": 1}])  # fmt: skip
def test_files_that_are_not_pinned_whole_are_refused(pinned: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"files": {"a": pinned}}))
    with pytest.raises(InputError, match=r"not a manifest: files\.a\."):
        FolderManifest.open(tmp_path / "m.json")


def test_manifests_that_cannot_be_read_and_too_large_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the manifest cannot be read: No such file"):
        FolderManifest.open(tmp_path / "absent.json")
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(InputError, match="not a manifest: the file: "):
        FolderManifest.open(tmp_path / "m.json")
    assert MAX_BYTES == 64 * 2**20
    for size, told in ((MAX_BYTES + 1, "more than 67108864 bytes"), (MAX_BYTES, "not a manifest")):
        with (tmp_path / "large.json").open("wb") as file:
            file.truncate(size)  # a hole: nothing is written
        with pytest.raises(InputError, match=told):
            FolderManifest.open(tmp_path / "large.json")
