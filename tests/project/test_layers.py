"""The packages' layers: imports run downward only, and none runs in a circle."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import networkx
import pytest

from tests.support.layers import LAYERS


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package by its own."""
    files = {path for layer in LAYERS for path in Path(layer).rglob("*.py")}
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports anywhere in it, within functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in modules() else node.module for name in inner)


@pytest.fixture(scope="module")
def graph() -> networkx.DiGraph:
    """Who imports whom."""
    found = networkx.DiGraph()
    for name, path in modules().items():
        found.add_edges_from((name, other) for other in imported(path) if other in modules() and other != name)
    return found


def test_imports_run_downward_only(graph: networkx.DiGraph) -> None:
    def layer(name: str) -> int:
        return LAYERS.index(name.partition(".")[0])

    assert len(graph) > 200
    assert not [(name, other) for name, other in graph.edges if layer(other) > layer(name)]


def test_imports_run_in_no_circle(graph: networkx.DiGraph) -> None:
    circles = [sorted(circle) for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]
    assert not circles


def test_every_module_is_installed_with_its_package() -> None:
    told = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    homes = {path.parent for path in modules().values() if path.parent.name != "data"}
    for home in homes:
        assert (home / "__init__.py").is_file(), home
        assert any(fnmatch(".".join(home.parts), pattern) for pattern in told["packages"]["find"]["include"]), home
    assert set(told["package-data"]) <= {".".join(home.parts) for home in homes}
    for layer in LAYERS:  # type checkers of whoever installs it read our types
        assert Path(layer, "py.typed").is_file() and "py.typed" in told["package-data"][layer], layer


def test_what_tests_share_is_no_test() -> None:
    """It is in `tests/support/`, or in the test's own folder if that is a program (`tests/hostile`)."""
    shared = {"packages", "slow", "support"}
    for path in Path("tests").rglob("*.py"):
        for name in (name for name in imported(path) if name.startswith("tests.")):
            place = name.split(".")
            assert place[1] in shared or (place[1] == path.parts[1] == "hostile"), f"{path} imports {name}"


@pytest.mark.parametrize("kind", [*LAYERS, "tests", "benchmarks", "docs"])
def test_no_folder_is_a_heap_and_no_file_a_book(kind: str) -> None:
    """At most 15 files beside each other, and modules of at most 400 lines."""
    there = [path for path in Path(kind).rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    beside = Counter(path.parent for path in there)
    assert not {str(folder): count for folder, count in beside.items() if count > 15}
    lengths = {str(path): path.read_text(encoding="utf-8").count("\n") for path in there if path.suffix == ".py"}
    assert not {path: lines for path, lines in lengths.items() if lines > 400}
