"""Mutation testing: small faults put into a module one at a time; the quick tests of that module should see each.

    python -m benchmarks.mutants eval.budget.budget [MODULE ...] [--sample 60] [--seed 1]

Tests are collected and run once, each with the lines that it runs. Then for every mutant a forked child swaps the code
of one function (or the value of one constant) in the modules as they are loaded, and runs the tests that run its line
until one fails. mutmut copies the whole project, imports it again for each run and leaves constants of modules alone,
among them limits that decide; a fork costs milliseconds.

`results/mutants.json` keeps the survivors; those that `mutants_equivalent.yaml` lists change nothing that could be seen
from outside, each for the reason given there.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import inspect
import os
import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import hypothesis
import pytest
import yaml
from _pytest.runner import runtestprotocol

from benchmarks import pages

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.yaml")
MOST_BYTES = 4 << 30  # of a mutant that takes more and more
SLOW_S = 4.0  # CPU seconds; slower tests are left out
READS = ".readback"  # in the names of modules that make nothing: artifacts that the tests keep are as good as new ones
OURS = ("bluelm", "calibration", "compress", "export", "targets", "eval", "pipeline", "tests")

TESTS: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("mutants_tests.yaml").read_text(encoding="utf-8"))

# in their arguments
SYMMETRIC = ("alike", "min", "max", "minimum", "maximum", "array_equal", "equal", "compare_digest")
SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,), ast.Pow: (ast.Mult,), ast.LShift: (ast.RShift,), ast.RShift: (ast.LShift,),
    ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,), ast.BitXor: (ast.BitOr,),
}  # fmt: skip


def file_of(name: str) -> str:
    """Where the tests are that `mutants_tests.yaml` calls so: export/gguf/bpe is tests/export/gguf/test_bpe.py."""
    folder, _, last = name.rpartition("/")
    return f"tests/{folder}/test_{last}.py"


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        place: function (Class.method) or constant of the module that it is in.
        lines: of the statement's own, first and last.
        was, now: the changed expression or statement as text.
        tree: gives the whole module with the fault.
        turn: counts equal changes in one place.
    """

    place: str
    lines: tuple[int, int]
    was: str
    now: str
    tree: Callable[[], ast.Module] = field(compare=False, repr=False)
    turn: int = 1

    @property
    def key(self) -> str:
        turn = f" ({self.turn})" if self.turn > 1 else ""
        return f"{self.place}: {self.was} -> {self.now}{turn}"


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its text: operators, comparisons, constants, conditions, returns,
    statements and arguments. Annotations, default values, assertions and what errors say stay as they are."""
    tree = ast.parse(source)
    found, turns = list[Mutant](), Counter[tuple[str, str, str]]()
    for place, statement in _statements(tree.body, ""):
        first, last = _own_lines(statement)
        for path, node in _expressions(statement):
            for changed in _changes(node, statement):
                was, now = _text(node), _text(changed)
                if was != now:
                    turns[place, was, now] += 1
                    mutated = partial(_replaced, tree, statement, path, changed)
                    found.append(Mutant(place, (first, last), was, now, mutated, turns[place, was, now]))
    return found


def _statements(body: list[ast.stmt], place: str) -> Iterator[tuple[str, ast.stmt]]:
    """Statements of functions, and assignments of the module, with their outermost function or constant."""
    for statement in body:
        match statement:
            case ast.FunctionDef():
                for inner in ast.walk(statement):
                    nested = inner is not statement and not isinstance(inner, ast.FunctionDef | ast.ClassDef)
                    if isinstance(inner, ast.stmt) and nested:
                        yield place + statement.name, inner
            case ast.ClassDef():
                inside = [inner for inner in statement.body if isinstance(inner, ast.FunctionDef | ast.ClassDef)]
                yield from _statements(list[ast.stmt](inside), f"{place}{statement.name}.")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                if name.isupper():  # others are names of types, which pydantic has built into its models already
                    yield name, statement


def _own_lines(statement: ast.stmt) -> tuple[int, int]:
    """Of a compound statement those of its head."""
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return statement.lineno, max(statement.lineno, last)


Path_ = tuple[tuple[str, int | None], ...]


def _expressions(statement: ast.stmt) -> Iterator[tuple[Path_, ast.AST]]:
    """The statement itself and every expression in it, but for those of statements inside it, with the way there."""
    if isinstance(statement, ast.Assert | ast.Import | ast.ImportFrom | ast.Global | ast.Pass):
        return
    yield (), statement
    if not isinstance(statement, ast.Raise):
        yield from _below(statement, ())


def _below(node: ast.AST, path: Path_) -> Iterator[tuple[Path_, ast.AST]]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "ctx", "returns", "decorator_list"):
            continue
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            usual = isinstance(child, ast.AST) and not isinstance(child, ast.stmt | ast.JoinedStr | ast.match_case)
            if usual and not isinstance(child, ast.ExceptHandler):
                yield (*path, (name, index)), child
                yield from _below(child, (*path, (name, index)))


def _changes(node: ast.AST, statement: ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[op, *rest]):
            for swap in SWAPS.get(type(op), ()):
                yield _with(node, ops=[swap(), *rest])
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign():
            for swap in SWAPS.get(type(node.op), ()):
                yield _with(node, op=swap())
            if isinstance(node, ast.AugAssign):
                yield ast.Pass()
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield node.operand  # of a constant the constant changes: -1 -> -2
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(value * 2 if value else 1.0)
        case ast.If() | ast.IfExp() | ast.While() if not isinstance(node.test, ast.Compare | ast.UnaryOp):
            yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Return(value=ast.expr() as value) if not _none(value):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield ast.Pass()
        case ast.Call(args=[first, second, *rest]) if ast.unparse(node.func).rpartition(".")[2] not in SYMMETRIC:
            if not any(isinstance(value, ast.Starred) for value in (first, second)):
                yield _with(node, args=[second, first, *rest])


def _text(node: ast.AST) -> str:
    """Of a compound statement its head."""
    return ast.unparse(node).partition("\n")[0]


def _none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _with(node: ast.AST, **changes: object) -> ast.AST:
    made = copy.copy(node)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def _replaced(tree: ast.Module, statement: ast.stmt, path: Path_, changed: ast.AST) -> ast.Module:
    """A copy of the module with the node at `path` of a statement changed."""
    memo: dict[int, Any] = {}
    made = copy.deepcopy(tree, memo)
    twin = memo[id(statement)]
    if not path:
        for parent in ast.walk(made):
            for name, value in ast.iter_fields(parent):
                if isinstance(value, list) and any(child is twin for child in value):
                    setattr(parent, name, [changed if child is twin else child for child in value])
    else:
        *way, (name, index) = path
        for step, at in way:
            twin = getattr(twin, step) if at is None else getattr(twin, step)[at]
        if index is None:
            setattr(twin, name, changed)
        else:
            getattr(twin, name)[index] = changed
    for node in ast.walk(made):
        if isinstance(node, ast.stmt | ast.expr) and not hasattr(node, "lineno"):
            ast.copy_location(node, statement)
    return ast.fix_missing_locations(made)


def put_into(module: ModuleType, mutant: Mutant) -> bool:
    """Make the loaded module that of the mutant; False where its place cannot be reached (a class's decorators hid it).

    Functions keep their identity, so that whoever imported them runs the mutant too.
    """
    code = compile(mutant.tree(), module.__file__ or "", "exec", dont_inherit=True)
    held = vars(module).get(mutant.place)
    if "." not in mutant.place and not isinstance(inspect.unwrap(held) if callable(held) else held, FunctionType):
        return _new_constant(module, mutant)
    found = next((one for one in _codes(code) if one.co_qualname == mutant.place), None)
    owner: Any = module
    *classes, name = mutant.place.split(".")
    for part in classes:
        owner = vars(owner)[part]
    function = _function(vars(owner).get(name))
    if found is None or function is None:
        return False
    function.__code__ = found
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield one
            yield from _codes(one)


def _function(held: Any) -> FunctionType | None:
    for name in ("fget", "func", "wrapped", "__func__", "__wrapped__"):
        held = getattr(held, name, held)
    held = inspect.unwrap(held) if callable(held) else held
    return held if isinstance(held, FunctionType) else None


def _new_constant(module: ModuleType, mutant: Mutant) -> bool:
    """Wherever the constant was imported."""
    statement = next(one for one in mutant.tree().body if one.lineno == mutant.lines[0])
    old = vars(module)[mutant.place]
    exec(compile(ast.Module([statement], []), module.__file__ or "", "exec", dont_inherit=True), vars(module))
    new = vars(module)[mutant.place]
    for name, other in list(sys.modules.items()):
        if name.partition(".")[0] in OURS and vars(other).get(mutant.place) is old:
            setattr(other, mutant.place, new)
    return True


class Campaign:
    """A pytest plugin: runs the tests once with their lines, then every mutant in a child."""

    def __init__(self, name: str, sample: int, seed: int, only: str | None) -> None:
        self.name, self.sample, self.seed, self.only = name, sample, seed, only
        self.result: dict[str, Any] | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """Behind conftest's profile: the same examples each time, and no shrinking of what failed."""
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutants", hypothesis.settings(), derandomize=True, database=None, phases=phases
        )
        hypothesis.settings.load_profile("mutants")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        module = importlib.import_module(self.name)
        file = str(module.__file__)
        seen = {item: _lines_of(item, file) for item in session.items}
        failed = [item.nodeid for item, (passed, _, _) in seen.items() if not passed]
        if failed or not seen:
            raise pytest.UsageError(f"these fail without any mutant: {failed or 'nothing collected'}")
        quick = sorted((item for item in seen if seen[item][2] < SLOW_S), key=lambda item: seen[item][2])
        every = mutants_of(Path(file).read_text(encoding="utf-8"))
        if self.only:
            every = [mutant for mutant in every if self.only in mutant.key]
        known = equivalent(self.name)
        left = [mutant for mutant in every if mutant.key not in known]
        chosen = sorted(
            random.Random(self.seed).sample(left, min(self.sample, len(left))), key=lambda mutant: mutant.lines
        )
        killed, unreached, survivors = 0, 0, list[dict[str, str]]()
        for mutant in chosen:
            lines = set(range(mutant.lines[0], mutant.lines[1] + 1))
            constant = mutant.place in vars(module) and not callable(vars(module)[mutant.place])
            tests = [item for item in quick if constant or seen[item][1] & lines]
            limit = int(5 * sum(seen[item][2] for item in tests)) + 10
            outcome = _in_child(lambda m=mutant, t=tests: _first_failure(module, m, t), limit)
            killed += outcome == "killed"
            unreached += outcome == "unreached"
            if outcome == "survived":
                why = "no test runs it" if not tests else f"{len(tests)} tests pass"
                survivors.append({"line": str(mutant.lines[0]), "mutant": mutant.key, "why": why})
                print(f"  {self.name}:{mutant.lines[0]} {mutant.key} ({why})", flush=True)
        tried = len(chosen) - unreached
        print(f"{self.name}: {killed} of {tried} killed ({len(every)} mutants, {len(quick)} tests)", flush=True)
        self.result = {
            "module": self.name, "mutants": len(every), "tried": tried, "killed": killed, "seed": self.seed,
            "equivalent": len(every) - len(left), "survivors": survivors,
            "tests": len(quick), "slow": [item.nodeid for item in seen if item not in quick],
        }  # fmt: skip
        return True


def _lines_of(item: pytest.Item, file: str) -> tuple[bool, set[int], float]:
    """Whether a test passes, which lines of a file it runs, and in how many CPU seconds."""
    lines: set[int] = set()

    def inside(frame: FrameType, event: str, _: object) -> Any:
        lines.add(frame.f_lineno)
        return inside

    def calls(frame: FrameType, event: str, _: object) -> Any:
        return inside if frame.f_code.co_filename == file else None

    started = time.process_time()
    threading.settrace(calls)
    sys.settrace(calls)
    try:
        reports = runtestprotocol(item, log=False, nextitem=None)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # pyright: ignore[reportArgumentType]
    return all(report.passed or report.skipped for report in reports), lines, time.process_time() - started


def _first_failure(module: ModuleType, mutant: Mutant, tests: list[pytest.Item]) -> int:
    """0 survived, 1 killed, 2 unreached."""
    if not put_into(module, mutant):
        return 2
    if READS not in module.__name__:
        _forget()
    for item in tests:
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=None)):
            return 1
    return 0


def _forget() -> None:
    """What tests made once with the sound module and kept is made again."""
    for name, other in list(sys.modules.items()):
        if name.partition(".")[0] == "tests":
            for held in vars(other).values():
                clear = getattr(held, "cache_clear", None)
                if callable(clear):
                    clear()


def _in_child(run: Callable[[], int], limit_s: int) -> str:
    """The outcome of a mutant; what breaks the process or takes `limit_s` of CPU, or `MOST_BYTES`, is killed too."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
            resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            code = run()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return {0: "survived", 2: "unreached"}.get(os.waitstatus_to_exitcode(status), "killed")


def equivalent(name: str) -> dict[str, str]:
    """Mutants of a module that change nothing, and why."""
    listed = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.is_file() else {}
    return {row["mutant"]: row["why"] for row in listed.get(name, [])}


def keep(found: dict[str, Any]) -> None:
    """Into the results, in place of what they held of that module."""
    made = pages.stamp()
    before = pages.results("mutants")["modules"] if (pages.RESULTS / "mutants.json").is_file() else []
    others = [row for row in before if row["module"] != found["module"]]
    rows = sorted([*others, {**found, "day": made["day"], "commit": made["commit"]}], key=lambda row: row["module"])
    known = [(name, *one) for name in TESTS for one in equivalent(name).items()]
    left = [{"module": name, "mutant": mutant, "why": why} for name, mutant, why in known]
    pages.save("mutants", {"made": made, "modules": rows, "equivalent": left})


def main() -> None:
    parser = argparse.ArgumentParser(description="Put small faults into modules and see whether their tests fail.")
    parser.add_argument("modules", nargs="+", choices=sorted(TESTS), metavar="MODULE")
    parser.add_argument("--sample", type=int, default=60, help="mutants a module, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="mutants whose text holds this; results are not saved")
    given = parser.parse_args()
    os.chdir(ROOT)
    for name in given.modules:
        campaign = Campaign(name, given.sample, given.seed, given.only)
        files = [file_of(test) for test in TESTS[name]]
        code = pytest.main(["-q", "--durations=0", "--no-header", "-p", "no:cacheprovider", *files], [campaign])
        if campaign.result is None:
            sys.exit(int(code) or 1)
        if not given.only:
            keep(campaign.result)


if __name__ == "__main__":
    main()
