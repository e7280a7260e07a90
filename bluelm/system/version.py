"""Which bluelm-export this is: its release, and the commit where that is known."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

NAME = "bluelm-export"
ROOT = Path(__file__).parents[2]


def told() -> str:
    """For people, e.g. "0.1.0 (commit 4aa8053, with changes)"; the release alone where no commit is known."""
    try:
        release = version(NAME)
    except PackageNotFoundError:  # run from its sources, never installed
        release = "not installed"
    found = commit()
    return f"{release} (commit {found})" if found else release


def commit() -> str | None:
    """The commit of a checkout, or that pip installed from (PEP 610); None: nobody wrote it down."""
    return _of_checkout(ROOT) if (ROOT / ".git").exists() else _of_pip()


def _of_checkout(folder: Path) -> str | None:
    head = _git(folder, "rev-parse", "--short", "HEAD")
    if head is None:
        return None
    return f"{head}, with changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else head


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _of_pip() -> str | None:
    try:
        note = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, json.JSONDecodeError):
        return None
    return str(note.get("vcs_info", {}).get("commit_id", ""))[:7] or None
