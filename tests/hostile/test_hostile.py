"""The corpus of hostile input at every run: all that can lie where a file is expected, and a draw of odd values.

`python -m tests.hostile` reads all of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.rows import FORMATS
from tests.support.readers import READERS

ROOT = Path(__file__).parents[2]
MOST = 2  # values of a family


@pytest.fixture(scope="module")
def judged() -> dict[str, dict[str, object]]:
    """By family; read in processes with limits, forked from one that has the libraries."""
    command = [sys.executable, "-m", "tests.hostile", "--most", str(MOST)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout, ran.stderr[-2000:]
    found = map(json.loads, ran.stdout.splitlines())
    return {each["row"]: each for each in found}


@pytest.mark.parametrize("reader", READERS)
def test_hostile_input_ends_in_words(reader: str, judged: dict[str, dict[str, object]]) -> None:
    """No traceback, no hang, no memory without bound, nothing written elsewhere, nothing that steers a terminal."""
    families = [name for name in judged if name.startswith(f"{reader}: ")]
    assert {name: judged[name]["faults"] for name in families if judged[name]["faults"]} == {}
    assert all(judged[name]["inputs"] for name in families)
    assert judged[f"{reader}: files"]["refused"] or READERS[reader]().mends, "nothing is refused"
    assert reader not in FORMATS or judged[f"{reader}: its format"]["refused"]
