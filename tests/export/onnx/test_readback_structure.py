"""How one ONNX graph differs from another, told in full: known answers on a graph of two nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.onnx.readback_structure import structure_faults


def graph() -> ModelProto:
    """y = relu(x @ w) * 2, the weight in a file."""
    weight = numpy_helper.from_array(np.zeros((3, 4), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "64"), ("length", "48")):
        weight.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], name="first", alpha=1.0, transB=1),
        helper.make_node("Mul", ["a", "two"], ["y"], name="second"),
    ]
    sizes: dict[str, list[Any]] = {"x": ["n", 4], "y": [2, 3]}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    two = numpy_helper.from_array(np.array([2], np.float32), "two")
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight, two]))


def constant(model: ModelProto, index: int) -> Any:
    return model.graph.initializer[index]


def node(model: ModelProto, index: int) -> Any:
    return model.graph.node[index]


def shape(model: ModelProto, side: str) -> Any:
    return getattr(model.graph, side)[0].type.tensor_type


def moved(model: ModelProto, key: str, value: str) -> None:
    """Another word on where the weight lies."""
    for entry in constant(model, 0).external_data:
        if entry.key == key:
            entry.value = value


CHANGES: dict[str, tuple[Callable[[ModelProto], Any], list[str]]] = {
    "nothing": (lambda m: None, []),
    "another operation": (lambda m: setattr(node(m, 1), "op_type", "Add"),
                          ["node 1, Mul second: op_type is Add instead of Mul"]),
    "another domain": (lambda m: setattr(node(m, 1), "domain", "ours"),
        ["node 1, Mul second: domain is ours instead of "]),
    "other inputs": (lambda m: node(m, 1).input.reverse(), ["node 1, Mul second: input is two, a instead of a, two"]),
    "an input more": (lambda m: node(m, 1).input.append("x"),
        ["node 1, Mul second: input is a, two, x instead of a, two"]),
    "another output": (lambda m: node(m, 1).output.append("z"), ["node 1, Mul second: output is y, z instead of y"]),
    "another name": (lambda m: setattr(node(m, 1), "name", "third"),
        ["node 1, Mul second: name is third instead of second"]),
    "another attribute": (lambda m: setattr(node(m, 0).attribute[0], "f", 2.0),
                          ["node 0, Gemm first: alpha is 2.0 instead of 1.0"]),
    "an attribute more": (lambda m: node(m, 1).attribute.append(helper.make_attribute("axis", 1)),
                          ["node 1, Mul second: axis is 1 instead of nothing"]),
    "an attribute less": (lambda m: node(m, 0).attribute.pop(), ["node 0, Gemm first: transB is nothing instead of 1"]),
    "a remark": (lambda m: setattr(node(m, 1), "doc_string", "hello"), ["node 1, Mul second: it is written otherwise"]),
    "a node less": (lambda m: m.graph.node.pop(), ["node 1, Mul second, is missing"]),
    "two nodes more": (lambda m: m.graph.node.extend([helper.make_node("Neg", ["y"], ["z"], name="more")] * 2),
                       ["node 2, Neg more, is too many"]),
    "an input of another size": (lambda m: setattr(shape(m, "input").shape.dim[1], "dim_value", 5),
                                 ["input x float [n, 5] instead of x float [n, 4]"]),
    "an input of a fixed size": (lambda m: setattr(shape(m, "input").shape.dim[0], "dim_value", 2),
                                 ["input x float [2, 4] instead of x float [n, 4]"]),
    "an output of another type": (lambda m: setattr(shape(m, "output"), "elem_type", TensorProto.FLOAT16),
                                  ["output y float16 [2, 3] instead of y float [2, 3]"]),
    "an input less": (lambda m: m.graph.input.pop(), ["input nothing instead of x float [n, 4]"]),
    "an output more": (lambda m: m.graph.output.append(helper.make_tensor_value_info("z", TensorProto.INT64, [])),
                       ["output z int64 [] instead of nothing"]),
    "other numbers": (lambda m: setattr(constant(m, 1), "raw_data", b"\0\0\0\1"), []),  # told elsewhere
    "numbers at another place": (lambda m: moved(m, "offset", "128"), []),
    "numbers of another file": (lambda m: moved(m, "location", "x.bin"),
                                ["the constant w is float [3, 4] in a file instead of float [3, 4] in a file"]),
    "another word on the place": (lambda m: constant(m, 0).external_data.add(key="checksum", value="1"),
                                  ["the constant w is float [3, 4] in a file instead of float [3, 4] in a file"]),
    "numbers in the graph": (lambda m: constant(m, 0).CopyFrom(
                                 numpy_helper.from_array(np.zeros((3, 4), np.float32), "w")),
                             ["the constant w is float [3, 4] in the graph instead of float [3, 4] in a file"]),
    "another shape": (lambda m: constant(m, 1).dims.append(1),
                      ["the constant two is float [1, 1] in the graph instead of float [1] in the graph"]),
    "a constant less": (lambda m: m.graph.initializer.pop(), ["the constant two is missing"]),
    "a constant more": (lambda m: m.graph.initializer.append(numpy_helper.from_array(np.ones(1), "z")),
                        ["the constant z is too many"]),
    "a constant twice": (lambda m: m.graph.initializer.append(constant(m, 1)), ["the constant two is there twice"]),
    "another version": (lambda m: setattr(m, "ir_version", 3), ["ir_version of the file are others than we write"]),
    "another name of the graph": (lambda m: setattr(m.graph, "name", "h"),
        ["graph of the file are others than we write"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_difference_is_told(name: str) -> None:
    change, wanted = CHANGES[name]
    found = graph()
    change(found)
    file: Any = SimpleNamespace(path=Path("folder/prefill.onnx"), model=found)
    assert list(structure_faults(file, graph())) == [f"prefill.onnx: {line}" for line in wanted]
