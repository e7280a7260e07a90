"""Compares the metadata of compiled binaries and their EPContext wrappers with the ONNX graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from onnx import GraphProto, NodeProto, ValueInfoProto, helper, numpy_helper

from export.onnx.reader import read_model
from targets.qualcomm.messages import BinaryContents, GraphBorder, TensorBorder


def read_graph(path: Path) -> GraphProto:
    """An ONNX file's graph without its weights.

    Raises:
        InputError: the file is missing, or is none.
    """
    return read_model(path).graph


def onnx_border(path: Path) -> GraphBorder:
    """Inputs and outputs of an ONNX graph; of integer ones the encoding that the graph reads or writes them by."""
    graph = read_graph(path)
    encodings = _encodings(graph)

    def border(value: ValueInfoProto) -> TensorBorder:
        about = value.type.tensor_type
        dtype = str(helper.tensor_dtype_to_np_dtype(about.elem_type))
        shape = tuple(dimension.dim_value for dimension in about.shape.dim)
        return TensorBorder(value.name, dtype, shape, *encodings.get(value.name, (None, 0)))

    return GraphBorder(graph.name, tuple(map(border, graph.input)), tuple(map(border, graph.output)))


def border_faults(graph: GraphBorder, source: GraphBorder | None) -> Iterator[str]:
    """Tensors of a compiled graph that are others than those of the ONNX graph, if there is one to compare with."""
    if source is None:
        return
    for what, mine, theirs in (("input", graph.inputs, source.inputs), ("output", graph.outputs, source.outputs)):
        found, wanted = ({tensor.name: tensor for tensor in side} for side in (mine, theirs))
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                yield f"{what} {name} is {_told(found.get(name))} instead of {_told(wanted.get(name))}"


def wrapper_faults(wrapper: Path, contents: BinaryContents, source: GraphBorder | None) -> Iterator[str]:
    """A wrapper that is none, names another graph than its ONNX graph's, or was written by another compiler.

    Args:
        source: the ONNX graph's border; None where it is not at hand.
    """
    graph = read_graph(wrapper)
    if [node.op_type for node in graph.node] != ["EPContext"]:
        yield f"{', '.join(node.op_type for node in graph.node) or 'nothing'} instead of one EPContext"
        return
    (node,) = graph.node
    told = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    name = told.get("partition_name", b"").decode()
    if node.name != name:
        yield f"names two graphs, {node.name} and {name}"
    if told.get("ep_sdk_version", b"").decode() != contents.compiler:
        yield "is by another compiler than the binary"
    compiled = next((graph for graph in contents.graphs if graph.name == name), None)
    if compiled is None:
        yield f"the binary does not hold the graph {name}"
        return
    yield from border_faults(compiled, source)
    for fault in border_faults(_plain(compiled), _plain(onnx_border(wrapper))):
        yield f"the binary's {fault} of the wrapper"


def binary_of(wrapper: Path) -> Path | None:
    """The file beside it that a wrapper names; None if it names none."""
    for node in read_graph(wrapper).node:
        for attribute in node.attribute:
            if attribute.name == "ep_cache_context":
                return wrapper.parent / attribute.s.decode()
    return None


def _plain(graph: GraphBorder) -> GraphBorder:
    """Without encodings, which wrappers do not tell."""
    inputs, outputs = (
        tuple(replace(tensor, scale=None, zero=0) for tensor in side) for side in (graph.inputs, graph.outputs)
    )
    return GraphBorder(graph.name, inputs, outputs)


def _encodings(graph: GraphProto) -> dict[str, tuple[float, int]]:
    """(scale, zero point) of every tensor of codes, by name."""
    single = {tensor.name: tensor for tensor in graph.initializer if not tensor.dims}
    found: dict[str, tuple[float, int]] = {}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in single:
            name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
            scale, zero = (numpy_helper.to_array(single[given]) if given else 0 for given in _parameters(node))
            found[name] = float(scale), int(zero)
    return found


def _parameters(node: NodeProto) -> tuple[str, str]:
    """Names of scale and zero point; "" where there is none."""
    return node.input[1], node.input[2] if len(node.input) > 2 else ""


def _told(tensor: TensorBorder | None) -> str:
    if tensor is None:
        return "not there"
    encoding = "" if tensor.scale is None else f" by {tensor.scale:.6g} from {tensor.zero}"
    return f"{tensor.dtype} {list(tensor.shape)}{encoding}"
