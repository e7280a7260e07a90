"""A share of benchmarks/faults/command.py: one of each fault done to `quantize`, then the same command again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults.kinds import FAULTS
from tests.packages import requires

ROOT = Path(__file__).parents[3]
ELSEWHERE = ("at a moment", "child", "tmpfs", "EIO at a write and after it")
"""What other faults are the like of (a moment is a write or a read in the end), or `quantize` has not."""
TRIED = [name for name in FAULTS if not any(part in name for part in ELSEWHERE)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "benchmarks.faults", str(out), "--only", "quantize", "--each", "1"]
    command += ["--fault", *TRIED]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in (out / "trials-1.jsonl").read_text().splitlines()]


@requires("gcc", "libc6-dev")
def test_what_comes_out_behind_a_fault_is_what_an_undisturbed_run_makes(rows: list[dict[str, object]]) -> None:
    """To the byte, or it is refused in words; what was finished is kept, and no process is left."""
    assert {row["fault"]: row["why"] for row in rows if row["result"] == "FAULT"} == {}
    assert {row["fault"] for row in rows} == set(TRIED)


@requires("gcc", "libc6-dev")
def test_faults_hit(rows: list[dict[str, object]]) -> None:
    """Those that do not depend on how fast the machine is."""
    hit = {row["fault"] for row in rows if row["hit"]}
    certain = {name for name in TRIED if name.startswith(("EIO", "no space", "a flipped bit in"))}
    assert hit >= certain | {"kill -9 at a write", "SIGINT or SIGTERM in a read"}
    killed = next(row for row in rows if row["fault"] == "kill -9 at a write")
    assert killed["first"] == -9
    assert all(row["first"] == 2 for row in rows if str(row["fault"]).startswith("no space"))
