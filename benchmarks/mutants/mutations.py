"""Small faults of a module's source, one at a time, and putting one into the module as it is loaded."""

from __future__ import annotations

import ast
import copy
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

OURS = ("bluelm", "calibration", "compress", "export", "targets", "eval", "pipeline", "tests")
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
