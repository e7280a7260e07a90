"""Compares the graph that Qualcomm's compiler was given, as the plug-in dumps it, with the ONNX graph.

`dump_json_qnn_graph` of onnxruntime-qnn writes each tensor's name, type, dimensions and encoding, and each node. The
plug-in folds the pairs of QuantizeLinear and DequantizeLinear into encodings, and puts nodes of its own between:

    ONNX    x.codes -> Dequantize -> x -> MatMul -> y.exact -> Quantize -> y.codes
    QNN     x.codes -> (Dequantize -> Reshape ->) MatMul (-> Reshape -> Quantize) -> y.codes

The dump has no numbers of weights: those are held by the digest of the file that they lie in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from bluelm.errors import InputError
from targets.qualcomm.border import read_graph
from targets.qualcomm.system import DTYPES

KINDS = {
    "Add": {"ElementWiseAdd"},
    "Concat": {"Concat"},
    "Gather": {"Gather"},
    "MatMul": {"MatMul", "FullyConnected"},
    "Mul": {"ElementWiseMultiply"},
    "RMSNormalization": {"RmsNorm"},
    "Reshape": {"Reshape"},
    "Sigmoid": {"Sigmoid"},
    "Slice": {"StridedSlice"},
    "Softmax": {"Softmax"},
    "Transpose": {"Transpose"},
}
"""ONNX operations of `export/onnx/npu.py`, and what the plug-in makes of them."""
PAIRS = ("QuantizeLinear", "DequantizeLinear")
BETWEEN = {"Quantize", "Dequantize", "Reshape", "Convert"}
"""What the plug-in puts between: it changes types and dimensions, no values beyond their encoding."""
INPUT, OUTPUT, STATIC = 0, 1, 4  # Qnn_TensorType_t
TURNED = "_transpose"  # the name of a weight that the plug-in has turned ends so


def faults(dump: Path, source: Path) -> Iterator[str]:
    """What the compiler was given otherwise than the ONNX graph `source` says.

    Raises:
        InputError: the dump cannot be read.
    """
    try:
        graph = json.loads(dump.read_text(encoding="utf-8"))["graph"]
        tensors, nodes = graph["tensors"], graph["nodes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the dump of the compiler's graph cannot be read: {error}", where=dump) from None
    yield from _Given(read_graph(source), tensors, nodes).faults()


class _Given:
    def __init__(self, graph: GraphProto, tensors: Mapping[str, Any], nodes: Mapping[str, Any]) -> None:
        self._graph, self._tensors, self._nodes = graph, tensors, nodes
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {node.output[0]: node for node in graph.node}
        self._given = {name: node for node in nodes.values() for name in node["output_names"]}

    def faults(self) -> Iterator[str]:
        yield from self._border()
        for node in self._graph.node:
            if node.op_type in PAIRS:
                yield from self._encoding(node)
            else:
                yield from self._operation(node)
        own = {node.name for node in self._graph.node}
        for name, node in self._nodes.items():
            if name not in own and node["type"] not in BETWEEN:
                yield f"{name}: an operation {node['type']} that the ONNX graph does not have"

    def _border(self) -> Iterator[str]:
        for kind, values in ((INPUT, self._graph.input), (OUTPUT, self._graph.output)):
            wanted = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}
            found = {name: tensor["dims"] for name, tensor in self._tensors.items() if tensor["type"] == kind}
            if found != wanted:
                yield f"inputs and outputs: {found} instead of {wanted}"

    def _encoding(self, node: NodeProto) -> Iterator[str]:
        """Type, scale and zero point of codes; of weights in groups or rows the type and the number of codes."""
        name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        constant = self._constants.get(name)
        turned = f"{name}{TURNED}" if constant is not None and name not in self._tensors else name
        tensor = self._tensors.get(turned)
        if tensor is None:
            yield f"{name}: is not there"
            return
        if constant is not None and (tensor["type"] != STATIC or np.prod(tensor["dims"]) != np.prod(constant.dims)):
            yield f"{name}: {tensor['dims']} codes instead of {list(constant.dims)}"
        scale = self._constants[node.input[1]]
        if np.prod(scale.dims) > 1:  # the dump does not tell the scales of groups and rows
            if DTYPES.get(tensor["data_type"]) != "int8":  # 4 bits are held in bytes, too
                yield f"{name}: codes of type {tensor['data_type']:#x} instead of int8"
            return
        zero = self._constants[node.input[2]] if len(node.input) > 2 else None
        encoding = tensor["quant_params"]["scale_offset"]
        found = DTYPES.get(tensor["data_type"]), np.float32(encoding["scale"]), -encoding["offset"]
        wanted = _dtype(zero, constant), np.float32(_number(scale)), 0 if zero is None else int(_number(zero))
        if found != wanted:
            yield f"{name}: type, scale and zero point are {found} instead of {wanted}"

    def _operation(self, node: NodeProto) -> Iterator[str]:
        given = self._nodes.get(node.name)
        if given is None or given["type"] not in KINDS.get(node.op_type, ()):
            yield f"{node.name}: {given and given['type']} instead of {node.op_type}"
            return
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        scalars = {key: next(iter(value.values())) for key, value in given["scalar_params"].items()}
        if "epsilon" in attributes and np.float32(scalars.get("epsilon", -1)) != np.float32(attributes["epsilon"]):
            yield f"{node.name}: epsilon {scalars.get('epsilon')} instead of {attributes['epsilon']}"
        if "perm" in attributes and self._parameter(given, "perm") != list(attributes["perm"]):
            yield f"{node.name}: the order of axes is {self._parameter(given, 'perm')}"
        if node.op_type == "Slice" and self._parameter(given, "ranges") != self._ranges(node, given):
            yield f"{node.name}: cuts {self._parameter(given, 'ranges')}"
        found = [self._origin(name) for name in given["input_names"]]
        wanted = [codes for name in node.input if (codes := self._codes(name)) is not None]
        if found != wanted:
            yield f"{node.name}: works on {found} instead of {wanted}"

    def _codes(self, name: str) -> str | None:
        """Where a value comes from: the codes that are dequantized to it, or an input; None: a number of the node."""
        maker = self._makers.get(name)
        if maker is None:
            return None if name in self._constants else name
        return maker.input[0] if maker.op_type == "DequantizeLinear" else name

    def _origin(self, name: str) -> str:
        """The same in the dump: back over what the plug-in put between."""
        while name not in self._makers and name not in self._constants:
            if name.removesuffix(TURNED) in self._constants:
                return name.removesuffix(TURNED)
            maker = self._given.get(name)
            if maker is None or maker["type"] not in BETWEEN:
                return name
            name = maker["input_names"][0]
        maker = self._makers.get(name)
        return maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else name

    @staticmethod
    def _parameter(given: Mapping[str, Any], name: str) -> Any:
        return next((tensor["data"] for tensor in given["tensor_params"].get(name, {}).values()), None)

    def _ranges(self, node: NodeProto, given: Mapping[str, Any]) -> list[list[int]]:
        """Begin, end and step of each axis of a Slice along one."""
        start, stop, axis = (int(_number(self._constants[name])) for name in node.input[1:4])
        dims = self._tensors[given["input_names"][0]]["dims"]
        return [[start, stop, 1] if index == axis else [0, size, 1] for index, size in enumerate(dims)]


def _number(tensor: TensorProto) -> Any:
    return numpy_helper.to_array(tensor).reshape(-1)[0]


def _dtype(zero: TensorProto | None, constant: TensorProto | None) -> str:
    held = zero if zero is not None else constant
    assert held is not None
    return str(helper.tensor_dtype_to_np_dtype(held.data_type))
