"""Changes of a Core AI program, one place at a time, through Apple's own package."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Graph = Any
Change = Callable[[dict[str, Graph]], None]
"""Is given the graphs by name."""


def rewritten(asset: Path, change: Change) -> None:
    """The .aimodel with another program; what it says of itself stays."""
    from export.coreai.dialect import authoring, ir

    program = authoring.AIModelAsset.load(asset).program
    with program._module._mlir_module.context, ir.Location.unknown():
        change({op.sym_name.value: op for op in program._module._body.operations})
    other = asset.with_name("other.aimodel")
    program.save_asset(other)
    for name in ("main.mlirb", "main.hash"):
        shutil.move(other / name, asset / name)
    shutil.rmtree(other)


def told(graph: str, **values: object) -> Change:
    """Numbers of a composite as it declares them, and nothing else."""

    def change(graphs: dict[str, Graph]) -> None:
        from export.coreai.dialect import ir

        attributes = graphs[graph].operation.attributes
        text = str(attributes["composite_decl"])
        for key, value in values.items():
            text, count = re.subn(rf"\b{key} = [^,:}}]+", f"{key} = {value} ", text)
            assert count == 1, (key, text)
        attributes["composite_decl"] = ir.Attribute.parse(text)

    return change


def scalar(graph: str, old: float, new: float, kind: type[np.floating] = np.float32) -> Change:
    """The number of a graph that was `old`, float32 or float16."""

    def change(graphs: dict[str, Graph]) -> None:
        from export.coreai.dialect import ir, ops

        for op in _constants(graphs[graph]):
            value = op.operation.attributes["value"]
            typed = str(value.type) == f"tensor<f{8 * np.dtype(kind).itemsize}>"
            if typed and np.isclose(float(np.array(ir.DenseElementsAttr(value))), old, rtol=1e-3):
                op.operation.attributes["value"] = ops.create_constant_attr(np.array(new, kind))
                return
        raise AssertionError(f"{graph} has no {old}")

    return change


def number(name: str, place: int, value: int, graph: str = "main") -> Change:
    """A byte of a weight's part or of a table, by its name in the file, as one graph reads it."""

    def change(graphs: dict[str, Graph]) -> None:
        from export.coreai.dialect import ir, raw

        for op in _constants(graphs[graph]):
            held = op.operation.attributes["value"]
            if ir.DenseResourceElementsAttr.isinstance(held) and f"dense_resource<{name}>" in str(held):
                numbers = raw(op, _bytes(held.type))
                numbers[place] ^= value
                made = ir.DenseResourceElementsAttr.get_from_buffer(numbers, "other", held.type)
                op.operation.attributes["value"] = made
                return
        raise AssertionError(f"there is no {name}")

    return change


def product_for_sum(graph: str = "main") -> Change:
    """Where the last residual is added."""
    return lambda graphs: _replace(graphs[graph], "coreai.decomposable.broadcasting_add", -1, "broadcasting_mul")


def sigmoid_for_silu(graph: str = "main") -> Change:
    """In the last block."""
    return lambda graphs: _replace(graphs[graph], "coreai.silu", -1, "sigmoid")


def unmasked(graph: str) -> Change:
    """The first softmax reads what the mask is not added to."""

    def change(graphs: dict[str, Graph]) -> None:
        softmax = _operations(graphs[graph], "coreai.softmax")[0]
        softmax.operation.operands[0] = softmax.operands[0].owner.operands[0]

    return change


def taken(graph: str, name: str, first: int, second: int, operand: int) -> Change:
    """Of two operations of one name, the second reads what the first does."""

    def change(graphs: dict[str, Graph]) -> None:
        found = _operations(graphs[graph], name)
        found[second].operation.operands[operand] = found[first].operands[operand]

    return change


def first_slots(graph: str) -> Change:
    """Keys of the first block go into the first slots, whatever the step."""

    def change(graphs: dict[str, Graph]) -> None:
        from export.coreai.dialect import ir, ops

        update = _operations(graphs[graph], "coreai.slice_update")[0]
        with ir.InsertionPoint(update):
            update.operation.operands[1] = ops.constant([0] * 5)

    return change


def renamed(graph: str, name: str) -> Change:
    """A function by another name."""

    def change(graphs: dict[str, Graph]) -> None:
        from export.coreai.dialect import ir

        graphs[graph].operation.attributes["sym_name"] = ir.StringAttr.get(name)

    return change


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(graphs: dict[str, Graph]) -> None:
        for one in changes:
            one(graphs)

    return change


def _replace(graph: Graph, name: str, place: int, other: str) -> None:
    from export.coreai.dialect import ir, ops

    one = _operations(graph, name)[place]
    with ir.InsertionPoint(one):
        one.results[0].replace_all_uses_with(getattr(ops, other)(*one.operands))
    one.operation.erase()


def _constants(graph: Graph) -> list[Any]:
    return _operations(graph, "coreai.constant")


def _operations(graph: Graph, name: str) -> list[Any]:
    return [op for op in graph.entry_block.operations if op.operation.name == name]


def _bytes(kind: Any) -> int:
    width = {"si4": 4, "si8": 8, "f16": 16}[str(kind.element_type)]
    return int(np.prod(kind.shape)) * width // 8
