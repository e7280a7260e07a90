"""A saved Core AI program as Apple's own package reads it: graphs of nodes, each with what it is computed from.

states   what a handle is read as, is what was last written into it, or `state` where nothing was
numbers  constants are copied out when they are asked for
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bluelm.errors import InputError
from export.coreai.dialect import authoring, ir, raw

PREFIXES = ("coreai.decomposable.broadcasting_", "coreai.", "coreaix.")
WIDTHS = {"f32": 32, "f16": 16, "si32": 32, "ui32": 32, "si8": 8, "si4": 4}
KINDS = {"f32": np.float32, "f16": np.float16, "si32": np.int32, "ui32": np.uint32, "si8": np.int8}


@dataclass(frozen=True, eq=False)
class Node:
    """A value.

    Attributes:
        op: what computes it, without the dialect's name; `input`, `state`.
        kind, shape: of its numbers, `f16`; None: free.
        extra: name of an input, graph that is called.
        layout: in memory, as the program says it of what is shared with a host; "" where it does not.
        array: numbers of a constant; int4 are int8 here.
    """

    op: str
    inputs: tuple[Node, ...] = ()
    kind: str = ""
    shape: tuple[int | None, ...] = ()
    extra: str = ""
    layout: str = ""
    array: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class Graph:
    """One function.

    Attributes:
        inputs: by name. outputs: by name; of a state what it holds at the end.
        composite: what it says that it computes as a whole, and numbers that it takes.
        private: it is called from this program alone.
    """

    inputs: Mapping[str, Node]
    outputs: Mapping[str, Node]
    composite: tuple[str, dict[str, Any]] | None
    private: bool


@dataclass(frozen=True)
class SavedProgram:
    """`graphs` by name; `held` keeps the binding's objects, which constants are read from."""

    graphs: Mapping[str, Graph]
    held: Any = field(repr=False)


def read_program(folder: Path) -> SavedProgram:
    """The program of an .aimodel.

    Raises:
        InputError: it is none, or not the one that its hash was taken of.
    """
    code, wanted = folder / "main.mlirb", folder / "main.hash"
    if not code.is_file() or not wanted.is_file():
        raise InputError("there is no program", where=folder, fix="export it again")
    with code.open("rb") as file:
        if hashlib.file_digest(file, "sha256").digest() != wanted.read_bytes():
            raise InputError("main.hash is of another program", where=folder, fix="export it again")
    try:
        program = authoring.AIModelAsset.load(folder).program
        graphs = {op.sym_name.value: _graph(op) for op in program._module._body.operations}
    except (RuntimeError, AttributeError, TypeError, LookupError) as error:
        raise InputError(f"the program cannot be followed: {error!r}"[:300], where=folder) from None
    return SavedProgram(graphs, program)


def _graph(op: Any) -> Graph:
    names, results = ([str(one["coreai.name"])[1:-1] for one in told] for told in (op.arg_attrs, op.res_attrs))
    inputs = {name: _input(name, value) for name, value in zip(names, op.arguments, strict=True)}
    made: dict[Any, Node] = dict(zip(op.arguments, inputs.values(), strict=True))
    for one in op.entry_block.operations:
        if one.operation.name == "coreai.output":
            ends = [made[value] for value in one.operands]
            outputs = {name: _written(node) for name, node in zip(results, ends, strict=True)}
            told = {attribute.name for attribute in op.operation.attributes}
            return Graph(inputs, outputs, _composite(op, told), "private" in str(op.operation)[:200])
        for place, result in enumerate(one.operation.results):
            made[result] = _node(one, result, place, tuple(made[value] for value in one.operation.operands))
    raise InputError("a graph without an end")


def _input(name: str, value: Any) -> Node:
    text = str(value.type)
    if text.startswith("!coreai.handle"):
        inner = value.type.inner_type
        return Node("handle", (), str(inner.element_type), _shape(inner), name, _layout(inner))
    return Node("input", (), str(value.type.element_type), _shape(value.type), name, _layout(value.type))


def _node(one: Any, result: Any, place: int, inputs: tuple[Node, ...]) -> Node:
    op = next(one.operation.name.removeprefix(prefix) for prefix in PREFIXES if one.operation.name.startswith(prefix))
    if op == "create_token":
        return Node("token")
    if op == "write_handle":
        return Node("write", inputs)
    if op == "read_handle":
        return _read(*inputs) if place == 0 else Node("token", inputs)
    kind, shape = str(result.type.element_type), _shape(result.type)
    if op == "constant":
        return Node(op, (), kind, shape, array=lambda: _numbers(one, kind, shape))
    extra = str(one.operation.attributes["callee"]).split("@")[1].split(">")[0] if op == "invoke" else ""
    return Node(op, inputs, kind, shape, extra, _layout(result.type))


def _read(handle: Node, token: Node) -> Node:
    """What a handle holds after what the token stands for."""
    if token.op == "token" and not token.inputs:
        return Node("state", (), handle.kind, handle.shape, handle.extra, handle.layout)
    return _written(token, handle)


def _written(node: Node, handle: Node | None = None) -> Node:
    """What was written last, where a node stands for that: by itself, or by having been read after it."""
    if node.op == "token" and node.inputs:
        return _read(*node.inputs)
    if node.op != "write":
        return node
    place, value, before = node.inputs
    if (handle is not None and place is not handle) or before.op != "token":
        raise InputError("a state is written out of order")
    return value


def _composite(op: Any, told: set[str]) -> tuple[str, dict[str, Any]] | None:
    if "composite_decl" not in told:
        return None
    text = str(op.operation.attributes["composite_decl"])
    name, rest = text.split('"')[1], text[text.index("{") : text.rindex(">")]
    declared = {one.name: one.attr for one in ir.DictAttr.parse(rest, context=op.operation.context)}
    numbers = {one.name: one.attr.value for one in declared.pop("op_attrs")}
    return name, numbers | {key: [str(each)[1:-1] for each in value] for key, value in declared.items()}


def _shape(kind: Any) -> tuple[int | None, ...]:
    return tuple(None if size < 0 else int(size) for size in kind.shape)


def _layout(kind: Any) -> str:
    return "" if kind.encoding is None else str(kind.encoding)


def _numbers(op: Any, kind: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Of a constant, as Apple's package copies them out; a splat is one number there."""
    sizes = [size or 0 for size in shape]
    value = op.operation.attributes["value"]
    if kind not in WIDTHS:
        raise InputError(f"a constant of {kind}")
    if ir.DenseElementsAttr.isinstance(value) and kind != "si4":
        return np.array(ir.DenseElementsAttr(value), KINDS[kind]).reshape(sizes)
    if ir.DenseElementsAttr.isinstance(value):
        splat = ir.DenseElementsAttr(value)
        if not splat.is_splat or int(splat.get_splat_value().value) != 0:
            raise InputError("4-bit numbers that are no codes")
        return np.zeros(sizes, np.int8)
    held = raw(op, (int(np.prod(sizes)) * WIDTHS[kind] + 7) // 8)
    if kind != "si4":
        return held.view(KINDS[kind]).reshape(sizes)
    pairs = np.stack([held & 15, held >> 4], axis=-1).reshape(sizes)
    return (pairs ^ 8).astype(np.int8) - np.int8(8)
