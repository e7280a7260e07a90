"""Hostile ONNX graphs, each made of a valid one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

from tests.hostile.protobufs import MANY, WIRE, Change, behind, inside, nested
from tests.hostile.texts import DIGITS, SHOUT

WORDS = (0, -1, 2**62, -(2**63))

GRAPH, NODE, ATTRIBUTE, SUBGRAPH = 7, 1, 5, 6  # fields of ModelProto, GraphProto, NodeProto, AttributeProto


def _model(change: Callable[[Any], None]) -> Change:
    """The graph with something changed."""

    def do(valid: bytes) -> bytes:
        model = onnx.ModelProto.FromString(valid)
        change(model.graph)
        return model.SerializeToString()

    return do


def _tensor(change: Callable[[TensorProto], None]) -> Change:
    """The same change of every constant that lies in another file."""

    def do(graph: Any) -> None:
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                change(tensor)

    return _model(do)


def _external(key: str, value: str) -> Change:
    def change(tensor: TensorProto) -> None:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
                return
        tensor.external_data.add(key=key, value=value)

    return _tensor(change)


def _dims(*sizes: int) -> Change:
    def change(tensor: TensorProto) -> None:
        tensor.ClearField("dims")
        tensor.dims.extend(sizes)

    return _tensor(change)


def _attribute(name: str, value: Any) -> Change:
    """Another value of an attribute, wherever it is."""

    def change(graph: Any) -> None:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name == name:
                    attribute.CopyFrom(helper.make_attribute(name, value))

    return _model(change)


def _attributes(graph: Any) -> None:
    graph.node[0].attribute.extend([helper.make_attribute("x", 1)] * 100_000)


def _named(graph: Any) -> None:
    for node in graph.node:
        node.name = node.output[0] = SHOUT


def _circle(graph: Any) -> None:
    for node in graph.node:
        node.input[0] = node.output[0]


def _same(graph: Any) -> None:
    graph.initializer.extend([graph.initializer[0]] * 20_000)


def _huge(graph: Any) -> None:
    graph.node[0].attribute.extend([helper.make_attribute("x", b"x" * (20 << 20))])


def _no_type(graph: Any) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            attribute.type = AttributeProto.UNDEFINED


def _sparse(graph: Any) -> None:
    graph.sparse_initializer.add().dims.extend([2**62] * 8)


def _cast_circle(graph: Any) -> None:
    graph.node.extend([helper.make_node("Cast", ["x"], ["y"], to=1), helper.make_node("Cast", ["y"], ["x"], to=1)])


ONNX: dict[str, Change] = {
    **WIRE,
    "numbers of another place": _external("location", "../../../../../../etc/passwd"),
    "numbers of an absolute place": _external("location", "/etc/passwd"),
    "numbers of a device": _external("location", "../../../../../../../dev/zero"),
    "numbers of the graph itself": _external("location", "prefill.onnx"),
    "numbers of a folder": _external("location", "."),
    "numbers of no place": _external("location", ""),
    "numbers of a place with a zero byte": _external("location", "weights\x00.bin"),
    "numbers of a place that shouts": _external("location", SHOUT),
    "an offset behind the end": _external("offset", str(2**40)),
    "an offset of 2^63": _external("offset", str(2**63)),
    "an offset of 5000 digits": _external("offset", DIGITS),
    "a negative offset": _external("offset", "-64"),
    "an offset that is none": _external("offset", "0x10"),
    "a length behind the end": _external("length", str(2**40)),
    "a length of 2^62": _external("length", str(2**62)),
    "a negative length": _external("length", "-1"),
    "a length of nothing": _external("length", "0"),
    "a length with underscores": _external("length", "1_0"),
    "numbers of no file": _tensor(lambda tensor: tensor.ClearField("external_data")),
    "sizes of 2^63 - 1": _dims(2**63 - 1, 2**63 - 1),
    "sizes whose product overflows": _dims(2**32, 2**32),
    "negative sizes": _dims(-1, -4),
    "1000 axes": _dims(*[1] * 1000),
    "no sizes": _dims(),
    "a type that is none": _tensor(lambda tensor: setattr(tensor, "data_type", 4096)),
    "texts for numbers": _tensor(lambda tensor: setattr(tensor, "data_type", TensorProto.STRING)),
    **{
        f"{name} of {word}": _attribute(name, word)
        for name in ("N", "K", "bits", "block_size")
        for word in WORDS
    },
    "a width that is text": _attribute("bits", "four"),
    "a width that is a list": _attribute("bits", [4, 4]),
    "an epsilon that is no number": _attribute("epsilon", float("nan")),
    "attributes without a type": _model(_no_type),
    "100,000 attributes": _model(_attributes),
    "an attribute of 20 MB": _model(_huge),
    "graphs in graphs": behind(nested((GRAPH,), 2000, (NODE, ATTRIBUTE, SUBGRAPH))),
    "graphs in graphs, 20 deep": behind(nested((GRAPH,), 20, (NODE, ATTRIBUTE, SUBGRAPH))),
    "millions of empty nodes": behind(inside(inside(b"", NODE) * MANY, GRAPH)),
    "millions of nodes of a letter": behind(inside(inside(b"\x22\x01x", NODE) * MANY, GRAPH)),
    "millions of empty attributes": behind(inside(inside(b"", ATTRIBUTE) * MANY, GRAPH, NODE)),
    "millions of empty names": behind(inside(b"\x0a\x00" * MANY, GRAPH, NODE)),
    "names that shout": _model(_named),
    "names that are no text": behind(inside(b"\xff\xfe", GRAPH, NODE, 3)),
    "nodes that read themselves": _model(_circle),
    "casts in a circle": _model(_cast_circle),
    "a constant 20,000 times": _model(_same),
    "a sparse constant of 2^496": _model(_sparse),
    "no graph": lambda valid: b"",
    "nothing in the graph": _model(lambda graph: graph.Clear()),
}  # fmt: skip
