"""Writing ONNX directly: nodes in order, initializers streamed into one file that several graphs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import onnx
from onnx import TensorProto, helper

ALIGNMENT = 64
INLINE_BYTES = 256
"""Initializers up to this size (scales, shapes) stay inside the graph's own file."""


@dataclass(frozen=True)
class StoredAt:
    """Where an initializer lies in the weight file."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    length: int


class WeightFile:
    """External data of one or more graphs, written tensor by tensor; a name is written once.

    A context manager. Nothing but the table of what was written stays in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredAt] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def write(self, name: str, data: np.ndarray, dtype: int, shape: Sequence[int]) -> None:
        """Append the raw bytes of `data`; int4 comes packed, two a byte, the first in the low half."""
        assert self._file is not None and name not in self.tensors, name
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        self.tensors[name] = StoredAt(dtype, tuple(shape), self._file.tell(), data.nbytes)
        self._file.write(np.ascontiguousarray(data).data)

    def proto(self, name: str) -> TensorProto:
        """The TensorProto that points at tensor `name`."""
        stored = self.tensors[name]
        proto = TensorProto(name=name, data_type=stored.dtype, dims=stored.shape)
        proto.data_location = TensorProto.EXTERNAL
        entries = {"location": self.path.name, "offset": stored.offset, "length": stored.length}
        for key, value in entries.items():
            proto.external_data.add(key=key, value=str(value))
        return proto


class NoFile(WeightFile):
    """A table of weights alone, for who wants to know the graph: nothing is written."""

    def __enter__(self) -> Self:
        return self

    def write(self, name: str, data: np.ndarray, dtype: int, shape: Sequence[int]) -> None:
        self.tensors[name] = StoredAt(dtype, tuple(shape), 0, data.nbytes)


class OnnxGraph:
    """One graph under construction. Names are the caller's, so equal input gives equal bytes."""

    def __init__(self, name: str, weights: WeightFile) -> None:
        self.name = name
        self.weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declare the tensor `name` an output; a name in `shape` is a free size."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def node(self, kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> None:
        """Append a node with one output, whose name is the node's too."""
        self._nodes.append(helper.make_node(kind, list(inputs), [output], name=output, domain=domain, **attributes))

    def initializer(self, name: str, array: np.ndarray) -> str:
        """A constant of a numpy type; the same name always means the same constant."""
        if name not in self._initializers:
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            if array.nbytes <= INLINE_BYTES:
                data = np.ascontiguousarray(array).tobytes()
                proto = TensorProto(name=name, data_type=dtype, dims=array.shape, raw_data=data)
                self._initializers[name] = proto
            else:
                if name not in self.weights:
                    self.weights.write(name, array, dtype, array.shape)
                self.stored(name)
        return name

    def stored(self, name: str) -> str:
        """An initializer that the weight file already holds."""
        if name not in self._initializers:
            self._initializers[name] = self.weights.proto(name)
        return name

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name wherever it stands."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new

    def model(self, opsets: dict[str, int], ir_version: int) -> onnx.ModelProto:
        """The graph as it is saved; its weights lie in the weight file."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        return helper.make_model(
            graph,
            producer_name="bluelm-export",
            ir_version=ir_version,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        )

    def save(self, path: Path, opsets: dict[str, int], ir_version: int) -> None:
        """Write the model; its weights lie in the weight file beside it."""
        path.write_bytes(self.model(opsets, ir_version).SerializeToString(deterministic=True))
