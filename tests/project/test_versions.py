"""Versions are written once: pyproject.toml says what is allowed, requirements.lock what is installed."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.errors import extra_of
from targets.tools import tools
from tests.support.layers import LAYERS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [*map(Requirement, chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))]


def locked() -> dict[str, list[Requirement]]:
    """What the lock says of a package: a row for each system or Python that takes another version."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            row = Requirement(line)
            found.setdefault(canonicalize_name(row.name), []).append(row)
    return found


def exact(requirement: Requirement) -> str | None:
    """The one version that it allows, if it is one."""
    (only, *more) = requirement.specifier or [None]
    return only.version if only is not None and only.operator == "==" and not more else None


def test_the_lock_has_every_direct_dependency_in_a_version_that_is_allowed() -> None:
    """`make lock` does that; a dependency that was added or moved needs it."""
    rows = locked()
    for wanted in DIRECT:
        if wanted.name == PROJECT["name"]:
            continue
        assert canonicalize_name(wanted.name) in rows, f"{wanted} is not locked"
        for row in rows[canonicalize_name(wanted.name)]:
            assert exact(row) is not None and wanted.specifier.contains(str(exact(row))), f"{row} against {wanted}"


def test_tools_have_the_versions_that_are_pinned() -> None:
    pinned = {canonicalize_name(one.name): exact(one) for one in DIRECT}
    told = {tool.name: tool.version for tool in tools() if tool.version is not None}
    assert "torch" in told and told == {name: pinned[canonicalize_name(name)] for name in told}


@pytest.mark.parametrize("name", ["torch", "onnxruntime-qnn"])
def test_commands_that_name_a_version_name_the_pinned_one(name: str) -> None:
    pin = next(exact(one) for one in DIRECT if one.name == name)
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.*"), *(ROOT / "targets" / "data").glob("*.yaml")]
    for path in files:
        assert set(re.findall(rf"\b{name}==([\d.]+\d)", path.read_text(encoding="utf-8"))) <= {pin}, path


def test_a_module_that_is_missing_leads_to_the_extra_that_brings_it() -> None:
    """Of all that the product imports and that an extra installs."""
    extras = PROJECT["optional-dependencies"]
    bring = {canonicalize_name(Requirement(row).name): extra for extra, rows in reversed(extras.items()) for row in rows
             if extra not in ("all", "docs", "test")}  # fmt: skip
    imported = {name for layer in LAYERS for path in Path(layer).rglob("*.py") for name in top_level(path)}
    brought: dict[str, str] = {}
    for name, extra in bring.items():
        files = distribution(name).files or ()
        brought |= {file.parts[0].removesuffix(".py"): extra for file in files if file.suffix == ".py"}
    wanted = {module: brought[module] for module in imported & brought.keys()}
    assert {"mlx_lm", "xllamacpp", "OpenSSL", "gguf", "executorch"} <= set(wanted)
    assert {module: extra_of(module) for module in wanted} == wanted
    assert extra_of("torch") is None and extra_of("bluelm") is None


def top_level(path: Path) -> Iterator[str]:
    """Packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from (name.partition(".")[0] for name in names)


def test_no_program_writes_torch_s_version_again() -> None:
    pin = str(next(one for one in DIRECT if one.name == "torch"))
    programs = [path for folder in (*LAYERS, "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in programs if pin in path.read_text(encoding="utf-8")]


def test_the_makefile_takes_torch_s_version_from_pyproject() -> None:
    """Named on pip's command line, so that it is not replaced by the newest build for CUDA."""
    said = subprocess.run(
        ["make", "-n", "test", "VENV=none"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    torch = next(one for one in DIRECT if one.name == "torch")
    assert re.search(rf"pip install .* {re.escape(str(torch))}$", said, flags=re.MULTILINE), said
    assert "torch==" not in (ROOT / "Makefile").read_text(encoding="utf-8").replace('"\\(torch==', "")
