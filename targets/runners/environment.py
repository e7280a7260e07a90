"""An environment of a runner's own, for one that does not go with the packages here: `doctor --setup RUNNER` makes it.

It lies in the user's cache, holds what is missing here or here in another version, and finds the rest here. A runner
that has one runs in it.
"""

from __future__ import annotations

import hashlib
import re
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from bluelm.errors import InputError, UnavailableError
from bluelm.system.children import run
from bluelm.system.files import atomic_folder, user_cache
from export.formats import StandardRunner, records
from targets.tools import Tool, tools

SITE = Path("lib") / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
SAID = 500  # characters of pip's last words in an error


def runners() -> dict[str, StandardRunner]:
    """Every standard runner, by its name."""
    found = (record.runner for record in records().values())
    return {runner.name: runner for runner in found if isinstance(runner, StandardRunner)}


def parts(runner: StandardRunner) -> list[Tool]:
    """What brings the program, and then what that needs."""
    rows = {tool.name: tool for tool in tools()}
    return [rows[name] for name in (runner.package, *runner.needs)]


def folder(runner: StandardRunner) -> Path:
    """Where its environment lies, or would: one for each list of packages and each environment behind it."""
    told = repr((sys.prefix, sys.version_info[:2], requirements(runner)))
    name = re.sub(r"\W+", "-", runner.name).lower()
    return user_cache() / "runners" / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def site(runner: StandardRunner) -> Path | None:
    """Packages of the runner's own environment; None where it has none."""
    found = folder(runner) / SITE
    return found if found.is_dir() else None


def python(runner: StandardRunner) -> str:
    """The interpreter that runs it."""
    return sys.executable if site(runner) is None else str(folder(runner) / "bin" / "python")


def requirements(runner: StandardRunner) -> list[str]:
    """For pip: in the versions that were tried together."""
    wanted = [tool for tool in parts(runner) if tool.kind == "package"]
    return [(tool.wheel or tool.name) + (f"=={tool.version}" if tool.version else "") for tool in wanted]


def set_up(name: str) -> Path:
    """Make the environment of a runner, once; its folder.

    Raises:
        InputError: no runner is called that. UnavailableError: pip cannot get the packages; with its words.
    """
    runner = runners().get(name)
    if runner is None:
        raise InputError(f"no runner is called {name!r}", fix=f"use one of: {', '.join(sorted(runners()))}")
    made = folder(runner)
    if made.is_dir():
        return made
    with atomic_folder(made) as temporary:
        venv.create(temporary, symlinks=True)
        behind = "\n".join(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
        (temporary / SITE / "behind.pth").write_text(behind + "\n", encoding="utf-8")  # last: its own come first
        _install(temporary / "bin" / "python", requirements(runner), name)
    return made


def _install(interpreter: Path, wanted: Sequence[str], name: str) -> None:
    """By this environment's pip; what is there in a version that does is not fetched again."""
    command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", "--no-input", *wanted]
    done = run([*command, "--disable-pip-version-check"], "pip")
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip()
        fix = f"check the network and pip's index, then run again: bluelm-export doctor --setup {quoted(name)}"
        raise UnavailableError(f"pip could not install {' '.join(wanted)}: {said[-SAID:]}", fix=fix)


def quoted(name: str) -> str:
    """As a shell takes it."""
    return f"'{name}'" if " " in name else name
