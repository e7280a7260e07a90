"""The workflows in docs/ci: their commands are run as GitHub and GitLab would, on a tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.report import Report
from tests.support.checkpoints.shapes import tiny_checkpoint

ROOT = Path(__file__).parents[2]
GITHUB, GITLAB = ROOT / "docs" / "ci" / "github.yml", ROOT / "docs" / "ci" / "gitlab-ci.yml"
QUICK = "--method rtn --samples 4 --length 32 --eval-tokens 512 --context 64"
OURS = {"TARGET": "generic-arm64", "MODEL": "model", "BUDGET": "budget.yaml"}


@dataclass(frozen=True)
class Checkout:
    """A repository with a model and a budget, and bluelm-export in the PATH."""

    folder: Path

    def budget(self, text: str) -> None:
        (self.folder / "budget.yaml").write_text(text)

    def shell(self, script: str, variables: Mapping[str, str], shell: str = "bash") -> subprocess.CompletedProcess[str]:
        """As GitHub (`bash -eo pipefail`) and GitLab's runner (`sh -e`) run a script."""
        flags = ["--noprofile", "--norc", "-eo", "pipefail"] if shell == "bash" else ["-e"]
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": str(ROOT),
            "BLUELM_EXPORT_HISTORY": os.environ["BLUELM_EXPORT_HISTORY"],
            **variables,
        }
        command = [shell, *flags, "-c", script]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    folder = tmp_path_factory.mktemp("checkout")
    tiny_checkpoint(folder / "model")
    program = folder / "bin" / "bluelm-export"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom pipeline.cli import main\nmain()\n")
    program.chmod(0o755)
    return Checkout(folder)


@dataclass(frozen=True)
class Job:
    """What a job came to: exit codes of its commands in order, all output, and what it would have uploaded."""

    codes: list[int]
    told: str
    uploads: list[Path]
    missing: list[str]


def github(checkout: Checkout, options: str) -> Job:
    """The steps in order; behind a failure only those with `always()`. The branch is the default one."""
    workflow: Any = yaml.safe_load(GITHUB.read_text())
    page = checkout.folder / "step-summary.md"
    variables = {**workflow["env"], **OURS, "OPTIONS": options}
    variables |= {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(page)}
    codes, told, uploads, missing = [], "", [], []
    for step in workflow["jobs"]["export"]["steps"]:
        if any(codes) and step.get("if") != "always()":
            continue
        if "run" in step and step["name"] != "Install":
            done = checkout.shell(step["run"], variables)
            codes.append(done.returncode)
            told += done.stdout + done.stderr
        elif str(step.get("uses")).startswith("actions/upload-artifact@"):
            for name in step["with"]["path"].split():
                path = checkout.folder / name
                (uploads if path.exists() else missing).append(path if path.exists() else name)
    return Job(codes, told, uploads, missing)


def gitlab(checkout: Checkout, options: str) -> Job:
    workflow: Any = yaml.safe_load(GITLAB.read_text())
    job = workflow["bluelm"]
    variables = {**workflow["variables"], **OURS, "OPTIONS": options}
    variables |= {"CI_COMMIT_BRANCH": "main", "CI_DEFAULT_BRANCH": "main"}
    done = checkout.shell("\n".join(job["script"]), variables, "sh")
    names = [*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]]
    found = {name: checkout.folder / name for name in names}
    uploads = [path for path in found.values() if path.exists()]
    missing = [name for name, path in found.items() if not path.exists()]
    return Job([done.returncode], done.stdout + done.stderr, uploads, missing)


@pytest.fixture(scope="module")
def jobs(checkout: Checkout) -> dict[str, Job]:
    """One after another in the same folder, which stands for the caches."""
    checkout.budget("max_artifact_bytes: 100 MB\nmax_runtime_kl: 0.01\n")
    found = {"first": github(checkout, f"{QUICK} --bits 8")}
    shutil.rmtree(checkout.folder / "dist" / "bundle")
    found["worse"] = github(checkout, f"{QUICK} --bits 4")
    shutil.rmtree(checkout.folder / "dist" / "compared")
    for path in (checkout.folder / "dist" / "run").rglob("*"):  # GitLab's caches keep whole seconds
        os.utime(path, (path.stat().st_atime, int(path.stat().st_mtime)))
    checkout.budget("max_artifact_bytes: 1 kB\n")
    found["too large"] = gitlab(checkout, f"{QUICK} --bits 4")
    return found


def test_both_run_the_same_commands() -> None:
    """What the jobs below show of the one holds for the other."""
    steps: Any = yaml.safe_load(GITHUB.read_text())["jobs"]["export"]["steps"]
    ours = [step["run"] for step in steps if "bluelm-export " in step.get("run", "")]
    job: Any = yaml.safe_load(GITLAB.read_text())["bluelm"]
    theirs = [script for script in job["script"] if "bluelm-export " in script]
    assert [text.strip() for text in ours] == [text.strip() for text in theirs]


def test_a_good_run_passes_and_uploads_report_and_bundle(jobs: dict[str, Job], checkout: Checkout) -> None:
    job = jobs["first"]
    assert job.codes == [0, 0, 0, 0, 0], job.told
    assert job.missing == ["dist/compared"], "there was no earlier run to compare with"
    assert {path.name for path in job.uploads} == {"report.html", "report.json", "junit.xml", "bundle"}
    assert "nothing was written" in job.told
    assert (checkout.folder / "step-summary.md").read_text().startswith("## ✅ PASSED")


def test_a_worse_run_fails_against_the_last_good_one(jobs: dict[str, Job], checkout: Checkout) -> None:
    job = jobs["worse"]
    assert job.codes == [0, 0, 3], job.told
    assert job.missing == []
    assert {path.name for path in job.uploads} == {"report.html", "report.json", "junit.xml", "compared"}
    assert "::error title=" in job.told
    assert "❌ FAILED" in (checkout.folder / "step-summary.md").read_text()


def test_a_failed_budget_fails_the_job_and_its_report_is_kept(jobs: dict[str, Job], checkout: Checkout) -> None:
    """On GitLab, with stages from a cache."""
    job = jobs["too large"]
    assert job.codes == [3], job.told
    assert "quantized: unchanged" in job.told
    assert "judged: unchanged" in job.told
    assert "FAIL max_artifact_bytes (files)" in job.told
    assert job.missing == ["dist/compared/", "dist/bundle/"]
    assert not Report.open(checkout.folder / "dist" / "run").passed
