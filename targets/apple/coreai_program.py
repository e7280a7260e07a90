"""A Core AI program as Apple's CPU runtime computes it here.

Its kernel for products of float16 is some forty times slower than that of float32, and adds up in float16, which
neither GPU nor Neural Engine does. So what adds up is computed in float32, and what comes of it is rounded to float16.
Codes are made weights at every call, which takes longer than all else; here that is a function of its own, called once.
How values lie in a chip's memory changes no number, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from export.coreai.dialect import Program, ir, ops

SUMS = ("coreai.decomposable.broadcasting_batch_matmul", "coreai.conv2d", "coreai.reduce_mean", "coreai.softmax")
UNPACK, LAID = "coreai.blockwise_shift_scale", ("coreaix.copy_with_constraints", "coreaix.copy_discarding_constraints")
CALL, NORM, LARGEST = "coreai.invoke", "rms_norm", "coreai.abs"
STREAM, WEIGHTS = "stream", "weights"
Graph = Any  # of Apple's binding, which has no annotations


def functions(program: Program) -> list[str]:
    """Names of what may be called from without."""
    graphs = program._module._body.operations
    return [graph.sym_name.value for graph in graphs if "priv" not in graph.operation.attributes]


def prepared(program: Program, norms: int) -> Program:
    """The program with sums in float32, with more outputs, and with weights as inputs.

    What the new function `weights` gives are more inputs of the others, by the same names; each takes those that it
    needs.

    Args:
        norms: the stream is given before every so many of its norms, in order: `stream.0`, `stream.1`, ...
    """
    graphs = [program._get_graph(name) for name in functions(program)]
    with program._module._mlir_module.context, ir.Location.unknown():
        for graph in graphs:
            _leave_out_layouts(graph)
            _widen(graph)
            _show(graph, norms)
        _unpack_once(program, graphs)
    return program


def _leave_out_layouts(graph: Graph) -> None:
    for value in [*graph.arguments, *(value for op in graph.entry_block.operations for value in op.results)]:
        value.set_type(_plain(value.type))
    for one in [op for name in LAID for op in _operations(graph, name)]:
        one.results[0].replace_all_uses_with(one.operands[0])
        one.operation.erase()
    _retype(graph, [_plain(kind) for kind in graph.type.results])


def _plain(kind: Any) -> Any:
    """A type without a layout."""
    if isinstance(kind, ops.HandleType):
        return ops.HandleType.get(_plain(kind.inner_type))
    if not isinstance(kind, ir.RankedTensorType):
        return kind
    return ir.RankedTensorType.get(kind.shape, kind.element_type)


def _widen(graph: Graph) -> None:
    for one in [op for name in SUMS for op in _operations(graph, name)]:
        result = one.results[0]
        if not isinstance(result.type.element_type, ir.F16Type):
            continue
        with ir.InsertionPoint(one):
            wide = [ops.cast(x, np.float32) if _is_half(x) else x for x in one.operands]
            kind = ir.RankedTensorType.get(result.type.shape, ir.F32Type.get())
            made = ir.Operation.create(one.operation.name, results=[kind], operands=wide)
            result.replace_all_uses_with(ops.cast(made.results[0], np.float16))
        one.operation.erase()


def _is_half(value: Any) -> bool:
    return isinstance(value.type.element_type, ir.F16Type)


def _show(graph: Graph, norms: int) -> None:
    """Norms of whole tokens, not of heads, are those of the stream: [1, T, hidden], or [1, hidden, 1, T]."""
    calls = [call for call in _operations(graph, CALL) if NORM in str(call.operation.attributes["callee"])]
    read = [call.operands[0] for call in calls if len(call.operands[0].type.shape) == 3]
    read += [op.operands[0] for op in _operations(graph, LARGEST) if op.operands[0].type.shape[2] == 1]
    streams = read[::norms]
    if streams:
        with ir.InsertionPoint(graph.entry_block):
            shown = ((f"{STREAM}.{i}", value) for i, value in enumerate(streams))
            graph.outputs_spec = [*graph.outputs_spec, *shown]


def _unpack_once(program: Program, graphs: Sequence[Graph]) -> None:
    with ir.InsertionPoint(program._module._body):
        made = ops.GraphOp(WEIGHTS, [], [], [])
    outputs: dict[tuple[Any, ...], tuple[str, Any]] = {}  # by the constants, which functions share
    for graph in graphs:
        names = [{one.name: one.attr for one in told} for told in graph.arg_attrs]
        given: dict[str, Any] = {}
        for one in _operations(graph, UNPACK):
            parts = tuple(value.owner.attributes["value"] for value in one.operands)
            if parts not in outputs:
                with ir.InsertionPoint(made.entry_block):
                    held = [value.owner.clone(ip=ir.InsertionPoint.current).results[0] for value in one.operands]
                    outputs[parts] = (f"{WEIGHTS}.{len(outputs)}", ops.blockwise_shift_scale(*held))
            name = outputs[parts][0]
            if name not in given:
                given[name] = graph.entry_block.add_argument(one.results[0].type, ir.Location.unknown())
                names.append({"coreai.name": ir.StringAttr.get(name)})
            one.results[0].replace_all_uses_with(given[name])
            one.operation.erase()
        _retype(graph, list(graph.type.results))
        graph.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get(one) for one in names])
    with ir.InsertionPoint(made.entry_block):
        made.outputs_spec = list(outputs.values())


def _retype(graph: Graph, results: list[Any]) -> None:
    """The graph's own type, of the arguments that it has."""
    types = ir.FunctionType.get(inputs=[one.type for one in graph.entry_block.arguments], results=results)
    graph.function_type = ir.TypeAttr.get(types)


def _operations(graph: Graph, name: str) -> list[Any]:
    return [op for op in graph.entry_block.operations if op.operation.name == name]
