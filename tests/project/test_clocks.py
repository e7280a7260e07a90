"""No test fails because the machine is busy: none asserts on a clock, sleeps in place of waiting, or waits briefly."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time"}
PATIENT = "HANG_S"
"""What only something that hangs takes (`tests/support/limits.py`): a clock may be held against that."""
ENDLESS = {"itertools.cycle", "itertools.count"}
WORDS = r"\bimport time\b|\bfrom time\b|\btimeout="
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def faults(source: str) -> list[str]:
    """Lines that hang on how fast the machine is, and what they do."""
    tree = ast.parse(source)
    return sorted({*_asserted(tree), *_slept(tree), *_brief(tree)})


def _asserted(tree: ast.AST) -> Iterator[str]:
    """Asserts that compare what a clock gave, within a function, in an expression or by a name."""
    for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))]:
        inside = list(_own(scope))
        timed: set[str] = set()
        patient: set[str] = {PATIENT}
        for _ in range(3):  # names that are made of names
            for node in inside:
                if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    made = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
                    timed |= made if _reads_clock(node.value, timed) else set()
                    patient |= made if patient & _names(node.value) else set()
        for node in inside:
            if isinstance(node, ast.Assert) and any(
                _reads_clock(compared, timed) and not patient & _names(compared)
                for compared in ast.walk(node.test)
                if isinstance(compared, ast.Compare)
            ):
                yield f"{node.lineno}: asserts on a clock"


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """What is below a node, but for what is in functions below it."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, FUNCTIONS):
            yield node
            yield from _own(node)


def _reads_clock(expression: ast.AST, timed: set[str]) -> bool:
    calls = (node.func for node in ast.walk(expression) if isinstance(node, ast.Call))
    return bool(timed & _names(expression)) or any(_is_of_time(call, CLOCKS) for call in calls)


def _is_of_time(function: ast.expr, names: set[str]) -> bool:
    """`time.monotonic`, `monotonic`, `time.monotonic_ns`; `time` alone only as `time.time`."""
    name = ast.unparse(function).removesuffix("_ns")
    return name.removeprefix("time.") in names and name != "time"


def _names(expression: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}


def _slept(tree: ast.AST) -> Iterator[str]:
    """Sleeps outside of a loop that ends when something has come: time is not what a test waits for."""

    def visit(node: ast.AST, waiting: bool) -> Iterator[str]:
        if isinstance(node, ast.While):
            waiting = True
        elif isinstance(node, ast.For):
            waiting = isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) in ENDLESS
        elif isinstance(node, FUNCTIONS):
            waiting = False
        elif isinstance(node, ast.Call) and _is_of_time(node.func, {"sleep"}) and not waiting:
            yield f"{node.lineno}: sleeps for a fixed time"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, waiting)

    yield from visit(tree, False)


def _brief(tree: ast.AST) -> Iterator[str]:
    """Limits of waiting that are a number, in place of the one that only what hangs takes."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="timeout", value=ast.Constant(value=int() | float())):
                yield f"{node.value.lineno}: waits for a fixed time"
            case _:
                pass


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("begin = time.monotonic()\nwork()\nassert time.monotonic() - begin < 1", "3: asserts on a clock"),
        ("def f():\n a = perf_counter()\n b = perf_counter() - a\n assert 0 < b / 2", "4: asserts on a clock"),
        ("assert (took := time.time_ns() - start) < 10**9, took", "1: asserts on a clock"),
        ("assert 2 > time.process_time() - begin", "1: asserts on a clock"),
        ("start()\ntime.sleep(0.5)\nassert done()", "2: sleeps for a fixed time"),
        ("for _ in range(3):\n time.sleep(1)", "2: sleeps for a fixed time"),
        ("while waits():\n def f():\n  sleep(1)", "3: sleeps for a fixed time"),
        ("thread.join(timeout=5)", "1: waits for a fixed time"),
        ("until = time.monotonic() + HANG_S\nassert time.monotonic() < until", None),
        ("seconds = time.perf_counter() - begin\nassert figures == {'seconds': 1}", None),
        ("def f():\n begin = time.time()\ndef g(begin):\n assert begin < 3", None),
        ("while not done():\n time.sleep(0.1)", None),
        ("for letter in itertools.cycle(b'ab'):\n send(letter)\n time.sleep(0.1)", None),
        ("run(timeout=HANG_S)\nrun(timeout=None)", None),
    ],
)  # fmt: skip
def test_what_hangs_on_the_machine_s_speed_is_found(source: str, found: str | None) -> None:
    assert faults(source) == ([found] if found else [])


def test_no_test_hangs_on_the_machine_s_speed() -> None:
    sources = {str(path): path.read_text(encoding="utf-8") for path in Path("tests").rglob("*.py")}
    timed = {path: source for path, source in sources.items() if re.search(WORDS, source)}
    assert len(timed) > 8
    found = {path: faults(source) for path, source in timed.items()}
    assert not {path: lines for path, lines in found.items() if lines}
