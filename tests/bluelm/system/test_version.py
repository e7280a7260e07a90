"""Version and commit: of a checkout, of what pip installed, and where nobody wrote one down."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from bluelm.system import version


def git(folder: Path, *words: str) -> str:
    as_someone = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *as_someone, *words], check=True, capture_output=True, text=True).stdout


def test_a_checkout_tells_its_commit_and_whether_files_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    assert version.commit() is None  # nothing is committed yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    short = git(tmp_path, "rev-parse", "--short", "HEAD").strip()
    assert version.told().endswith(f" (commit {short})")
    (tmp_path / "b").write_text("not one of its files")
    assert version.commit() == short
    (tmp_path / "a").write_text("2")
    assert version.told().endswith(f" (commit {short}, with changes)")


@pytest.mark.parametrize(
    ("note", "told"),
    [
        ({"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}, "0123456"),
        ({"url": "file:///x.whl", "archive_info": {}}, None),
        (None, None),
    ],
)
def test_an_installation_tells_what_pip_wrote(
    note: object, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEP 610's direct_url.json; an index or a wheel has no commit."""
    monkeypatch.setattr(version, "ROOT", tmp_path)
    text = None if note is None else json.dumps(note)
    monkeypatch.setattr(version, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
    assert version.commit() == told
    assert ("commit" in version.told()) == (told is not None)


def test_without_git_the_release_alone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(version, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert version.commit() is None and "commit" not in version.told()
