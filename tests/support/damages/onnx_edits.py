"""Edits of finished ONNX graphs: a bit of a constant, an attribute, a connection, something more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.artifacts.artifact import Artifact
from tests.support.damage import again

Edit = Callable[[ModelProto, Path], None]
"""Changes a graph; its numbers lie in the folder."""


def edited(artifact: Artifact, role: str, edit: Edit) -> Artifact:
    """The artifact with another graph of this role."""
    path = artifact.path(role)
    model = onnx.load(path, load_external_data=False)
    edit(model, artifact.folder)
    onnx.save(model, path)
    return again(artifact)


def tensor(model: ModelProto, name: str) -> TensorProto:
    """A constant by its name."""
    return next(t for t in model.graph.initializer if t.name == name)


def bump(name: str, at: int = 0) -> Edit:
    """Another bit in one byte of a constant, wherever it lies."""

    def edit(model: ModelProto, folder: Path) -> None:
        found = tensor(model, name)
        if found.data_location != TensorProto.EXTERNAL:
            data = bytearray(found.raw_data)
            data[at] ^= 1
            found.raw_data = bytes(data)
            return
        where = {entry.key: entry.value for entry in found.external_data}
        place = folder / where["location"]
        data = bytearray(place.read_bytes())
        data[int(where["offset"]) + at % int(where["length"])] ^= 1
        place.write_bytes(bytes(data))

    return edit


def attribute(node: str, name: str, value: Any) -> Edit:
    """Another attribute of a node."""

    def edit(model: ModelProto, folder: Path) -> None:
        found = next(n for n in model.graph.node if n.name == node)
        kept = [a for a in found.attribute if a.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def rewire(node: str, index: int, source: str) -> Edit:
    """A node that takes another input."""

    def edit(model: ModelProto, folder: Path) -> None:
        next(n for n in model.graph.node if n.name == node).input[index] = source

    return edit


def add_constant(model: ModelProto, folder: Path) -> None:
    """Four numbers that no node takes."""
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "more"))


def named_constant(name: str) -> Edit:
    """A number that no node takes, by a name that another model's constant has."""

    def edit(model: ModelProto, folder: Path) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), name))

    return edit


def narrowed(name: str) -> Edit:
    """The same numbers in float16, more or less."""

    def edit(model: ModelProto, folder: Path) -> None:
        found = tensor(model, name)
        found.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(found, str(folder)).astype(np.float16), name))

    return edit


def shortened(name: str) -> Edit:
    """A constant that lies in the graph itself and lacks its last byte."""

    def edit(model: ModelProto, folder: Path) -> None:
        found = tensor(model, name)
        found.raw_data = numpy_helper.to_array(found, str(folder)).tobytes()[:-1]
        del found.external_data[:]
        found.data_location = TensorProto.DEFAULT

    return edit


def add_node(model: ModelProto, folder: Path) -> None:
    """The stream behind block 0 through one more operation."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "layers.0.output":
                node.input[index] = "turned"
    model.graph.node.append(helper.make_node("Neg", ["layers.0.output"], ["turned"], name="turned"))


def other_opset(model: ModelProto, folder: Path) -> None:
    """Operations of an older version."""
    model.opset_import[0].version = 21


def cut_weights(model: ModelProto, folder: Path) -> None:
    """One matrix of each graph points beyond the end of the file."""
    entry = next(e for e in tensor(model, "lm_head.codes").external_data if e.key == "offset")
    entry.value = str(10**9)


def quiet_border(model: ModelProto, folder: Path) -> None:
    """A cache of fewer slots."""
    for value in model.graph.input:
        if value.name == "past_values.0":
            value.type.tensor_type.shape.dim[2].dim_value = 7
