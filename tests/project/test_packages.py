"""Tests that need a Debian package: skipped where it is missing, failed in CI, and told at the end of the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import packages

ROOT = Path(__file__).parents[2]
SUITE = """
import pytest
from tests.packages import need, requires

@requires("adb")
def test_marked():
    raise AssertionError

@pytest.fixture
def helped():
    need("zipalign", "openssl")

def test_helped(helped):
    raise AssertionError

def test_free():
    pass
"""


def suite(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The three tests on a machine whose PATH holds openssl alone."""
    path = tmp_path / "bin"
    path.mkdir()
    (path / "openssl").symlink_to(str(shutil.which("true")))
    (tmp_path / "test_it.py").write_text(SUITE)
    shutil.copyfile(ROOT / "tests" / "conftest.py", tmp_path / "conftest.py")
    variables = {**os.environ, "PATH": str(path), "PYTHONPATH": str(ROOT), "CI": "", **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "markers=requires", *options]
    return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)


def test_the_end_of_a_run_names_what_was_missing_and_what_installs_it(tmp_path: Path) -> None:
    ran = suite(tmp_path, "--numprocesses", "2")
    assert ran.returncode == 0, ran.stdout
    *_, told, command, closing = ran.stdout.splitlines()
    assert told.startswith("Tests were skipped for want of ")
    assert "adb, " in told and "zipalign" in told and "openssl" not in told
    assert "apt-get install --no-install-recommends" in command and " zipalign" in command
    assert closing.startswith("1 passed, 2 skipped")


def test_in_ci_it_is_a_failure(tmp_path: Path) -> None:
    ran = suite(tmp_path, CI="true")
    assert ran.returncode == 1
    assert "needs Debian's adb: " in ran.stdout and "needs Debian's zipalign: " in ran.stdout
    *_, told, command, closing = ran.stdout.splitlines()
    assert told.startswith("Tests failed for want of ") and "apt-get install" in command
    assert closing.startswith("1 passed, 2 errors")


def test_without_root_nothing_is_installed_and_the_command_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    packages.install(["adb", "zipalign"])
    assert capsys.readouterr().out.splitlines()[-1] == "  sudo apt-get install --no-install-recommends adb zipalign"


@pytest.mark.parametrize(("user", "calls"), [(0, ["update", "install"]), (1000, ["true", "update", "install"])])
def test_root_and_a_sudo_without_password_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, user: int, calls: list[str]
) -> None:
    """Stand-ins for sudo and apt-get note how they are called; the second installs a program."""
    log, adb = tmp_path / "log", tmp_path / "adb"
    for name in ("env", "sh", "cp"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    scripts = {
        "apt-get": f'#!/bin/sh\necho "$@" >> {log}\n[ $2 = update ] || cp -L {tmp_path}/env {adb}\n',
        "sudo": f'#!/bin/sh\n[ $1 = -n ] && shift && if [ $1 = true ]; then echo true >> {log}; else "$@"; fi\n',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    packages.install(["adb"])
    said = log.read_text().splitlines()
    assert [next(word for word in line.split() if not word.startswith("-")) for line in said] == calls
    assert said[-1].endswith(" adb") and "--no-install-recommends" in said[-1]
    packages.install(["adb"])
    assert log.read_text().splitlines() == said, "what is here is not installed again"
