"""Small faults are made of every kind, reach what is loaded already, and those called equivalent are there."""

from __future__ import annotations

import importlib
import sys
import threading
import types
from pathlib import Path

import pytest

from benchmarks.mutants import campaign
from benchmarks.mutants.campaign import ROOT, TESTS, equivalent, file_of
from benchmarks.mutants.mutations import mutants_of, put_into

SOURCE = """
LIMIT = 3

class Box:
    def holds(self, n: int = 4) -> bool:
        '''Not changed: 1 < 2.'''
        if not n:
            raise ValueError(f"{n + 1}")
        return n < LIMIT and n >= 0

def share(a, b):
    total = sum(divmod(a, b))
    total += 1
    return total / 2.0
"""


def test_every_kind_of_fault_is_made() -> None:
    assert {mutant.key for mutant in mutants_of(SOURCE)} == {
        "LIMIT: 3 -> 4",
        "Box.holds: not n -> n",
        "Box.holds: raise ValueError(f'{n + 1}') -> pass",
        "Box.holds: return n < LIMIT and n >= 0 -> return None",
        "Box.holds: n < LIMIT and n >= 0 -> n < LIMIT or n >= 0",
        "Box.holds: n < LIMIT -> n <= LIMIT",
        "Box.holds: n < LIMIT -> n >= LIMIT",
        "Box.holds: n >= 0 -> n > 0",
        "Box.holds: n >= 0 -> n < 0",
        "Box.holds: 0 -> 1",
        "share: divmod(a, b) -> divmod(b, a)",
        "share: total += 1 -> total -= 1",
        "share: total += 1 -> pass",
        "share: 1 -> 2",
        "share: return total / 2.0 -> return None",
        "share: total / 2.0 -> total * 2.0",
        "share: 2.0 -> 4.0",
    }


@pytest.mark.parametrize(("key", "n", "answer"), [
    ("LIMIT: 3 -> 4", 3, True),
    ("Box.holds: n < LIMIT -> n <= LIMIT", 3, True),
    ("Box.holds: 0 -> 1", 0, None),
    ("Box.holds: 0 -> 1", 1, True),
    ("Box.holds: n >= 0 -> n < 0", 1, False),
])  # fmt: skip
def test_a_fault_reaches_who_imported_the_function(
    key: str, n: int, answer: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = types.ModuleType("eval.made_up")
    module.__file__ = str(tmp_path / "made_up.py")
    monkeypatch.setitem(sys.modules, "eval.made_up", module)
    exec(compile(SOURCE, module.__file__, "exec"), vars(module))
    box = module.Box()
    (mutant,) = [one for one in mutants_of(SOURCE) if one.key == key]
    assert put_into(module, mutant)
    if answer is None:
        with pytest.raises(ValueError, match="1"):
            box.holds(n)
    else:
        assert box.holds(n) is answer


@pytest.mark.parametrize("name", TESTS)
def test_tests_and_equivalent_mutants_are_there(name: str) -> None:
    assert all((ROOT / file_of(test)).is_file() for test in TESTS[name])
    source = Path(importlib.import_module(name).__file__ or "").read_text(encoding="utf-8")
    assert set(equivalent(name)) <= {mutant.key for mutant in mutants_of(source)}
    assert all(equivalent(name).values())


def test_a_mutant_that_waits_for_ever_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "WAITS", 1)

    def wait() -> int:
        threading.Event().wait()
        return 0

    assert campaign._in_child(wait, 1) == "killed"
