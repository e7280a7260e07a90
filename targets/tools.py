"""Packages, programs and SDKs that runtimes need on this machine: which are installed, and how to get the others."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from bluelm.errors import UnavailableError
from export.formats import record

TABLE = Path(__file__).parent / "data" / "tools.yaml"


class Tool(BaseModel):
    """One thing that a runtime needs.

    Attributes:
        name: of the package, program or module.
        kind: `package` is installed by pip (version: the one that works with the others), `program` lies on the
            PATH, `module` is a vendor's Python module that no public index has, `library` is one of the system's
            that a package loads and does not bring.
        fix: how to get it. wheel: how pip is asked for it, where that is not its name alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["package", "program", "module", "library"]
    version: str | None = None
    purpose: str
    fix: str
    wheel: str | None = None


State = Literal["ok", "missing", "other version"]


@dataclass(frozen=True)
class FoundTool:
    """A tool as it was found here."""

    tool: Tool
    state: State
    found: str | None


@cache
def tools() -> tuple[Tool, ...]:
    """The whole table."""
    rows = yaml.safe_load(TABLE.read_text(encoding="utf-8"))["tools"]
    return tuple(Tool.model_validate(row) for row in rows)


def examine(tool: Tool, beside: Path | None = None) -> FoundTool:
    """Look for one tool; nothing is imported or run, a library is loaded.

    Args:
        beside: packages that come before those here, of an environment with these behind it.
    """
    if tool.kind == "program":
        path = shutil.which(tool.name)
        return FoundTool(tool, "ok" if path else "missing", path)
    if tool.kind == "module":
        there = importlib.util.find_spec(tool.name) is not None
        return FoundTool(tool, "ok" if there else "missing", "found" if there else None)
    if tool.kind == "library":
        return FoundTool(tool, "ok" if loads(tool.name) else "missing", None)
    try:
        found = _version(tool.name, beside)
    except importlib.metadata.PackageNotFoundError:
        return FoundTool(tool, "missing", None)
    same = tool.version is None or found.split("+")[0] == tool.version
    return FoundTool(tool, "ok" if same else "other version", found)


def _version(package: str, beside: Path | None) -> str:
    there = () if beside is None else importlib.metadata.distributions(name=package, path=[str(beside)])
    return next((found.version for found in there), None) or importlib.metadata.version(package)


def loads(library: str) -> bool:
    """Whether the system finds a shared library, e.g. "libatomic.so.1"."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def require(*names: str, otherwise: str = "") -> None:
    """See that tools of the table are here, before something imports them.

    Args:
        otherwise: what else the user can do, for the error.

    Raises:
        UnavailableError: one is missing; with how to get it.
    """
    missing = [tool for tool in tools() if tool.name in names and examine(tool).state == "missing"]
    if missing:
        fixes = [*(tool.fix for tool in missing), *([f"or {otherwise}"] if otherwise else [])]
        raise UnavailableError(f"not installed: {', '.join(tool.name for tool in missing)}", fix="; ".join(fixes))


def require_for(runtime: str) -> None:
    """See that everything that lowering for a runtime needs is here.

    Raises:
        UnavailableError: something is missing; with how to get it.
    """
    require(*record(runtime).tools)
