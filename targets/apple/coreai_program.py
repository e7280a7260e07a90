"""A Core AI program as Apple's CPU runtime computes it here.

Its kernel for products of float16 is some forty times slower than that of float32, and adds up in float16, which no
GPU does. So both sides of every product are widened to float32 first, and what comes of it is rounded to float16. Codes
are made weights at every call, which takes longer than all else; here that is a function of its own, called once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bluelm.errors import InputError
from export.coreai.dialect import Program, ir, ops

PRODUCT, UNPACK = "coreai.decomposable.broadcasting_batch_matmul", "coreai.blockwise_shift_scale"
CALL, NORM = "coreai.invoke", "rms_norm"
STREAM, WEIGHTS = "stream", "weights"
Graph = Any  # of Apple's binding, which has no annotations


def prepared(program: Program, name: str, norms: int) -> Program:
    """The program with products in float32, with more outputs, and with weights as inputs.

    Args:
        name: of the function. What the new function `weights` gives are more inputs of it, by the same names.
        norms: the stream is given before every so many of its norms, in order: `stream.0`, `stream.1`, ...

    Raises:
        InputError: it has no such function.
    """
    graph = program._get_graph(name)
    if graph is None:
        raise InputError(f"the program has no function {name!r}", fix="export it again")
    with graph.operation.context, ir.Location.unknown():
        _widen(graph)
        _show(graph, norms)
        _unpack_once(program, graph)
    return program


def _widen(graph: Graph) -> None:
    for one in _operations(graph, PRODUCT):
        x, y = one.operands
        if not isinstance(x.type.element_type, ir.F16Type):
            continue
        with ir.InsertionPoint(one):
            made = ops.broadcasting_batch_matmul(ops.cast(x, np.float32), ops.cast(y, np.float32))
            one.results[0].replace_all_uses_with(ops.cast(made, np.float16))
        one.operation.erase()


def _show(graph: Graph, norms: int) -> None:
    """Norms of whole tokens, not of heads, are those of the stream."""
    calls = [call for call in _operations(graph, CALL) if NORM in str(call.operation.attributes["callee"])]
    streams = [call.operands[0] for call in calls if len(call.operands[0].type.shape) == 3][::norms]
    with ir.InsertionPoint(graph.entry_block):
        graph.outputs_spec = [*graph.outputs_spec, *((f"{STREAM}.{i}", value) for i, value in enumerate(streams))]


def _unpack_once(program: Program, graph: Graph) -> None:
    held = _operations(graph, UNPACK)
    with ir.InsertionPoint(program._module._body):
        made = ops.GraphOp(WEIGHTS, [], [], [])
    outputs: list[tuple[str, Any]] = []
    names = [{one.name: one.attr for one in told} for told in graph.arg_attrs]
    for one in held:
        name = f"{WEIGHTS}.{len(outputs)}"
        with ir.InsertionPoint(made.entry_block):
            parts = [value.owner.clone(ip=ir.InsertionPoint.current).results[0] for value in one.operands]
            outputs.append((name, ops.blockwise_shift_scale(*parts)))
        given = graph.entry_block.add_argument(one.results[0].type, ir.Location.unknown())
        names.append({"coreai.name": ir.StringAttr.get(name)})
        one.results[0].replace_all_uses_with(given)
        one.operation.erase()
    with ir.InsertionPoint(made.entry_block):
        made.outputs_spec = outputs
    types = ir.FunctionType.get(inputs=[one.type for one in graph.arguments], results=list(graph.type.results))
    graph.function_type = ir.TypeAttr.get(types)
    graph.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get(one) for one in names])


def _operations(graph: Graph, name: str) -> list[Any]:
    return [op for op in graph.entry_block.operations if op.operation.name == name]
