"""The list of slow tests: who measures, who writes it, and what `make quick` then leaves out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import slow

ROOT = Path(__file__).parents[2]
PLUGIN = """
from pathlib import Path
from tests import slow
slow.LIST = Path("slow.txt")
slow.LIMIT, slow.STAYS = 0.2, 0.1
pytest_plugins = ["tests.slow"]
"""
TESTS = """
import time
import pytest

def work():
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass

@pytest.fixture(scope="module")
def made():
    work()

def test_first(made): ...
def test_second(made): ...
@pytest.mark.parametrize("long", [False, True])
def test_some(long):
    if long:
        work()
@pytest.mark.parametrize("case", range(5))
def test_many(case):
    until = time.process_time() + 0.18
    while time.process_time() < until:
        pass
def test_waits():
    time.sleep(0.3)
"""
LISTED = ["test_them.py::made (fixture)", "test_them.py::test_many", "test_them.py::test_some"]


@pytest.fixture
def run(tmp_path: Path):
    (tmp_path / "conftest.py").write_text(PLUGIN)
    (tmp_path / "test_them.py").write_text(TESTS)

    def pytest_says(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return pytest_says


def test_the_suite_measures_writes_and_leaves_out(run, tmp_path: Path) -> None:
    said = run()
    assert all(name in said for name in LISTED) and not (tmp_path / "slow.txt").exists()  # told, not failed
    run("-n", "1", "--write-slow")  # measured in another process
    assert sorted(slow_rows(tmp_path)) == LISTED
    quick = run("-m", "not slow", "-v")
    assert "Slow" not in quick
    assert "test_waits" in quick and "1 passed" in quick  # waiting is not the processor's time


def slow_rows(folder: Path) -> list[str]:
    return [line for line in (folder / "slow.txt").read_text().splitlines() if not line.startswith("#")]


def test_what_did_not_run_stays_and_what_got_quick_goes() -> None:
    before = ["a", "b", "c", "d"]
    assert slow.renewed(before, {"b": 0.7, "c": 0.1, "e": 1.5, "f": 0.5}) == ["a", "b", "d", "e"]
