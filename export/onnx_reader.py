"""Reading an ONNX artifact's quantized weights back: codes, scales and zero points of every linear, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper

from bluelm.errors import InputError
from export.packing import unpack

_WIDTHS: dict[int, type[np.generic]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
}
_CODES = (TensorProto.INT4, TensorProto.INT8)


@dataclass(frozen=True)
class Stored:
    """A weight as a file holds it.

    Attributes:
        codes: uint8 [out, in], as in the checkpoint.
        scales: [out, blocks], float16 or float32.
        zeros: uint8 [out, blocks]; None: the middle code.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int


class OnnxWeights:
    """The quantized weights of one graph; each is read from its file when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._graph: GraphProto = onnx.load(path, load_external_data=False).graph
        except (OSError, ValueError) as error:  # protobuf's DecodeError is a ValueError
            raise InputError(f"not an ONNX file: {error}", where=path, fix="export it again") from None
        self._tensors = {tensor.name: tensor for tensor in self._graph.initializer}
        self._sources = {node.output[0]: node.input[0] for node in self._graph.node if node.op_type == "Cast"}
        self._nodes = dict(self._weights())

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def place(self, name: str) -> tuple[str, ...]:
        """Where codes and scales lie, the same for two graphs that share them."""
        tensors = [self._tensors[self._sources.get(n, n)] for n in self._inputs(self._nodes[name])]
        return tuple(",".join(f"{e.key}={e.value}" for e in t.external_data) or t.raw_data.hex() for t in tensors)

    def read(self, name: str) -> Stored:
        """One weight."""
        node = self._nodes[name]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        return self._nbits(node, attributes) if node.op_type == "MatMulNBits" else self._dequantized(node)

    def initializer(self, name: str) -> np.ndarray:
        """An initializer by its name."""
        tensor = self._tensors[name]
        return self._raw(name).view(_WIDTHS[tensor.data_type]).reshape(tensor.dims)

    def _weights(self) -> Iterator[tuple[str, NodeProto]]:
        for node in self._graph.node:
            if node.op_type == "MatMulNBits":
                yield node.input[1].removesuffix(".codes"), node
            elif node.op_type == "DequantizeLinear":
                tensor = self._tensors.get(node.input[0])
                if tensor is not None and tensor.data_type in _CODES:
                    yield node.output[0], node

    @staticmethod
    def _inputs(node: NodeProto) -> list[str]:
        return list(node.input[1:] if node.op_type == "MatMulNBits" else node.input[:2])

    def _raw(self, name: str) -> np.ndarray:
        """uint8 [bytes] of an initializer, mapped where it is external."""
        tensor = self._tensors[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.frombuffer(tensor.raw_data, np.uint8)
        where = {entry.key: entry.value for entry in tensor.external_data}
        length, offset = int(where["length"]), int(where.get("offset", 0))
        try:
            return np.memmap(self._path.parent / where["location"], np.uint8, "r", offset, (length,))
        except (OSError, ValueError) as error:
            raise InputError(f"the weights of {name} cannot be read: {error}", where=self._path) from None

    def _floats(self, name: str) -> np.ndarray:
        name = self._sources.get(name, name)
        return self._raw(name).view(_WIDTHS[self._tensors[name].data_type])

    def _nbits(self, node: NodeProto, attributes: dict[str, int]) -> Stored:
        rows, columns, bits, size = (attributes[key] for key in ("N", "K", "bits", "block_size"))
        blocks = -(-columns // size)
        codes = unpack(self._raw(node.input[1]).reshape(rows, -1), bits, columns)
        scales = self._floats(node.input[2]).reshape(rows, blocks)
        zeros = None
        if len(node.input) > 3:
            zeros = unpack(self._raw(node.input[3]).reshape(rows, -1), bits, blocks)
        return Stored(codes, scales, zeros, bits)

    def _dequantized(self, node: NodeProto) -> Stored:
        tensor = self._tensors[node.input[0]]
        columns, rows = tensor.dims
        raw, bits = self._raw(node.input[0]), 4 if tensor.data_type == TensorProto.INT4 else 8
        codes = unpack(raw, bits, rows * columns).reshape(columns, rows) ^ (8 if bits == 4 else 128)
        scales = self._floats(node.input[1])
        return Stored(codes.T, scales.reshape(-1, rows).T, None, bits)
