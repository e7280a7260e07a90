"""`.ci/run`: the README's two commands in their order; a run that did not pass or made no bundle fails it.

The project's own workflow runs it, and `make quick` on macOS.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / ".ci" / "run"
PASSED = "PASSED  bluelm-demo on a chip\nBundle: dist/x.apk"
TESTED = "12 passed in 3.00s"


def ci(tmp_path: Path, said: str, *, run: int = 0, verified: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the script where `make run` says this; stand-ins for make and the tool note their calls."""
    programs = {
        "bin/make": f'echo "make $*" $CI >> log\n[ $2 = test ] && echo "{TESTED}" && exit\necho "{said}"\nexit {run}',
        "repository/.venv/bin/bluelm-export": f'echo "bluelm-export $*" >> log\nexit {verified}',
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    copy = tmp_path / "repository" / ".ci" / "run"
    copy.parent.mkdir()
    shutil.copyfile(SCRIPT, copy)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CI": ""}
    return subprocess.run(["bash", copy], env=environment, capture_output=True, text=True, check=False)


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "repository" / "log").read_text().splitlines()


def test_run_verify_test_and_the_closing_line_ends_it(tmp_path: Path) -> None:
    done = ci(tmp_path, PASSED)
    assert done.returncode == 0, done.stderr
    run, verify, test = calls(tmp_path)
    assert (run, test) == ("make --no-print-directory run true", "make --no-print-directory test true")
    assert verify == "bluelm-export verify --no-load dist/x.apk"
    assert done.stdout.splitlines()[-1] == TESTED


@pytest.mark.parametrize(
    ("said", "codes", "told"),
    [
        ("FAILED  bluelm-demo on a chip", {"run": 3}, ""),
        ("Bundle: dist/x.apk", {}, "did not say PASSED"),
        ("PASSED  bluelm-demo on a chip\nno bundle: the disk is full", {}, "made no bundle"),
        (PASSED, {"verified": 2}, ""),
    ],
)
def test_without_a_passing_verdict_and_a_bundle_it_fails(
    tmp_path: Path, said: str, codes: dict[str, int], told: str
) -> None:
    done = ci(tmp_path, said, **codes)
    assert done.returncode != 0
    assert told in done.stderr
    assert not any(" test " in call for call in calls(tmp_path))


def test_the_workflow_runs_commands_that_there_are_and_pins_its_actions() -> None:
    root = SCRIPT.parents[1]
    jobs = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert {job["runs-on"].partition("-")[0] for job in jobs.values()} == {"ubuntu", "macos"}
    for step in steps:
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
    commands = [step["run"] for step in steps if "run" in step]
    assert ".ci/run" in commands and any(command.startswith("make quick ") for command in commands)
    subprocess.run(["make", "--dry-run", "quick", "VENV=none"], cwd=root, check=True, capture_output=True)
