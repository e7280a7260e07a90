"""Programs that a model wrote run in a process of their own, with limits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from eval.tasks.run_code import passes


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("x = '你好 \ud800'", False),  # half of a character is no program
        ("this is no program", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("print('a' * 100_000)", True),
        ("import sys; sys.stdin.read(); input", True),
    ],
)
def test_only_programs_that_reach_their_end_pass(program: str, expected: bool) -> None:
    assert passes(program) == expected


@pytest.mark.linux  # other kernels do not hold RLIMIT_AS
def test_limits_hold(tmp_path: Path) -> None:
    assert not passes("b = bytearray(1 << 29)", memory=1 << 28)
    assert passes("b = bytearray(1 << 20)", memory=1 << 28)
    assert not passes("open('big', 'wb').write(bytes(1 << 21))")
    assert not passes("while True: pass", seconds=0.5)
    assert not passes("import time; time.sleep(600)", seconds=0.1)


def test_nothing_of_ours_is_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert passes("import os; assert 'SECRET_TOKEN' not in os.environ and os.listdir('.') == []")
    before = sorted(Path.cwd().iterdir())
    assert passes("open('left-behind', 'w').write('x')")
    assert sorted(Path.cwd().iterdir()) == before


def test_children_end_with_it(tmp_path: Path) -> None:
    """A program that forks cannot go on behind its end."""
    told = tmp_path / "child"
    program = f"""
import os, time
child = os.fork()
if child == 0:
    time.sleep(600)
open({str(told)!r}, "w").write(str(child))
"""
    assert passes(program), "the parent reached its end"
    state = Path("/proc", told.read_text(), "stat")
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
