"""Whether an ONNX graph is the one that is emitted for a model: the same nodes, borders and constants' shapes.

The graph is emitted anew, without its numbers, and held against the file. That shows what was changed since; whether
the numbers are right is another question, which `export/onnx/readback.py` answers without the exporter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from export.onnx.reader import OnnxFile, kind


def structure_faults(file: OnnxFile, wanted: ModelProto) -> Iterator[str]:
    """Each thing that is another than in `wanted`, which has no numbers."""
    where = file.path.name
    for fault in _faults(file.model, wanted):
        yield f"{where}: {fault}"


def _faults(found: ModelProto, wanted: ModelProto) -> Iterator[str]:
    mine, theirs = found.graph, wanted.graph
    yield from _nodes(mine.node, theirs.node)
    for side, a, b in (("input", mine.input, theirs.input), ("output", mine.output, theirs.output)):
        yield from _border(side, a, b)
    yield from _constants(mine.initializer, theirs.initializer)
    first, second = _rest(found), _rest(wanted)
    if first != second:
        names = [f.name for f in ModelProto.DESCRIPTOR.fields if getattr(first, f.name) != getattr(second, f.name)]
        yield f"{', '.join(names)} of the file are others than we write"


def _nodes(found: Iterable[NodeProto], wanted: Iterable[NodeProto]) -> Iterator[str]:
    """By their place: a runtime does not mind the order, but we write one."""
    for index, (mine, theirs) in enumerate(zip_longest(found, wanted)):
        if theirs is None:
            yield f"node {index}, {mine.op_type} {mine.name}, is too many"
            return
        if mine is None:
            yield f"node {index}, {theirs.op_type} {theirs.name}, is missing"
            return
        if mine != theirs:
            yield f"node {index}, {theirs.op_type} {theirs.name}: {_node_difference(mine, theirs)}"


def _node_difference(mine: NodeProto, theirs: NodeProto) -> str:
    for name in ("op_type", "domain", "input", "output", "name"):
        first, second = getattr(mine, name), getattr(theirs, name)
        if first != second:
            return f"{name} is {_told(first)} instead of {_told(second)}"
    first, second = ({a.name: helper.get_attribute_value(a) for a in node.attribute} for node in (mine, theirs))
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            return f"{name} is {first.get(name, 'nothing')} instead of {second.get(name, 'nothing')}"
    return "it is written otherwise"


def _told(value: object) -> str:
    return str(value) if isinstance(value, str) else ", ".join(map(str, value))  # pyright: ignore[reportArgumentType]


def _border(side: str, found: Iterable[ValueInfoProto], wanted: Iterable[ValueInfoProto]) -> Iterator[str]:
    for mine, theirs in zip_longest(found, wanted):
        if mine != theirs:
            yield f"{side} {_value(mine)} instead of {_value(theirs)}"


def _value(value: ValueInfoProto | None) -> str:
    if value is None:
        return "nothing"
    tensor = value.type.tensor_type
    sizes = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    return f"{value.name} {kind(tensor.elem_type)} [{sizes}]"


def _constants(found: Iterable[TensorProto], wanted: Iterable[TensorProto]) -> Iterator[str]:
    """Names, types and shapes; of how the numbers lie, only that there is one way to read them."""
    theirs = {tensor.name: tensor for tensor in wanted}
    seen: set[str] = set()
    for tensor in found:
        name = tensor.name
        if name in seen:
            yield f"the constant {name} is there twice"
        elif name not in theirs:
            yield f"the constant {name} is too many"
        elif _bare(tensor) != _bare(theirs[name]):
            yield f"the constant {name} is {_shape(tensor)} instead of {_shape(theirs[name])}"
        seen.add(name)
    for name in theirs:
        if name not in seen:
            yield f"the constant {name} is missing"


def _bare(tensor: TensorProto) -> TensorProto:
    """Without its numbers: raw, or in a file at a place and of a length."""
    bare = TensorProto()
    bare.CopyFrom(tensor)
    if tensor.data_location == TensorProto.EXTERNAL:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.keys() <= {"location", "offset", "length"}:
            bare.ClearField("external_data")
            bare.doc_string += where.get("location", "")  # the same file
    else:
        bare.ClearField("raw_data")
    return bare


def _shape(tensor: TensorProto) -> str:
    place = "in a file" if tensor.data_location == TensorProto.EXTERNAL else "in the graph"
    return f"{kind(tensor.data_type)} {list(tensor.dims)} {place}"


def _rest(model: ModelProto) -> ModelProto:
    """All but nodes, borders and constants."""
    rest = ModelProto()
    rest.CopyFrom(model)
    for name in ("node", "input", "output", "initializer"):
        rest.graph.ClearField(name)
    return rest
