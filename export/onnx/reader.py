"""Reading an ONNX artifact back: its nodes, its constants, and the quantized weights by name; one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from bluelm.errors import InputError
from bluelm.system.reading import MOST_DIGITS, check_regular
from bluelm.trust.paths import check_name
from export.artifacts.packing import unpack
from export.artifacts.protobufs import read_message

_WIDTHS: dict[int, type[np.generic]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT16: np.int16,
    TensorProto.UINT16: np.uint16,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
}
_CODES = (TensorProto.INT4, TensorProto.INT8)
MOST_MESSAGES = 1 << 18  # of a graph: the largest that are known have a tenth


@dataclass(frozen=True)
class HeldWeight:
    """A weight as a file holds it.

    Attributes:
        codes: uint8 [out, in], as in the checkpoint.
        scales: [out, blocks], float16 or float32.
        zeros: uint8 [out, blocks]; None: the middle code.
        spare: codes behind the last column, which fill up a block, stand for something else than 0.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int
    spare: bool = False


def kind(data_type: int) -> str:
    """Of a tensor: float, uint8 ..., or the number where ONNX knows none."""
    known = data_type in TensorProto.DataType.values()
    return TensorProto.DataType.Name(data_type).lower() if known else f"type {data_type}"


def _names(graph: GraphProto) -> Iterator[object]:
    for node in graph.node:
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for values in (graph.initializer, graph.input, graph.output):
        yield from (value.name for value in values)
    for tensor in graph.initializer:
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    for value in (*graph.input, *graph.output):
        yield from (size.dim_param for size in value.type.tensor_type.shape.dim)


def read_model(path: Path) -> ModelProto:
    """A graph without the numbers that lie beside it.

    Raises:
        InputError: it is none.
    """
    model = read_message(path, ModelProto(), "an ONNX file", MOST_MESSAGES)
    if not all(isinstance(name, str) for name in _names(model.graph)):  # protobuf hands it out as bytes
        raise InputError("not an ONNX file: a name is not UTF-8", where=path, fix="export it again")
    return model


class OnnxFile:
    """One graph; a tensor is read from its file when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Read the graph.

        Raises:
            InputError: it is none.
        """
        self.path, self.model = path, read_model(path)
        self.graph: GraphProto = self.model.graph
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    @cached_property
    def weights(self) -> dict[str, NodeProto]:
        """The node that holds each quantized weight, by the weight's name."""
        return dict(self._weights())

    def place(self, name: str) -> tuple[str, ...]:
        """Where codes and scales of a weight lie, the same for two graphs that share them."""
        tensors = [self.tensors.get(self._sources.get(n, n)) for n in self._inputs(self.weights[name])]
        return tuple(t.SerializeToString(deterministic=True).hex() if t is not None else "" for t in tensors)

    def weight(self, name: str) -> HeldWeight:
        """One weight.

        Raises:
            InputError: the file does not hold it whole.
        """
        node = self.weights[name]
        try:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            return self._nbits(node, attributes) if node.op_type == "MatMulNBits" else self._dequantized(node)
        except (ValueError, KeyError, IndexError, TypeError) as error:  # attributes say anything
            raise InputError(f"{name} cannot be read: {error}", where=self.path, fix="export it again") from None

    def array(self, name: str) -> np.ndarray:
        """A constant by its name, in its own type and shape.

        Raises:
            InputError: the file does not hold it whole.
        """
        tensor = self.tensors[name]
        width = _WIDTHS.get(tensor.data_type)
        raw = self._raw(name)
        count = math.prod(tensor.dims)
        if width is None or min(tensor.dims, default=0) < 0 or raw.nbytes != np.dtype(width).itemsize * count:
            raise InputError(f"{name} is of another type or size than it says", where=self.path, fix="export it again")
        return raw.view(width).reshape(tensor.dims)

    @cached_property
    def _sources(self) -> dict[str, str]:
        return {node.output[0]: node.input[0] for node in self.graph.node if node.op_type == "Cast"}

    def _weights(self) -> Iterator[tuple[str, NodeProto]]:
        for node in self.graph.node:
            if node.op_type == "MatMulNBits" and len(node.input) > 2:
                yield node.input[1].removesuffix(".codes"), node
            elif node.op_type == "DequantizeLinear":
                tensor = self.tensors.get(node.input[0])
                if tensor is not None and tensor.data_type in _CODES:
                    yield node.output[0], node

    @staticmethod
    def _inputs(node: NodeProto) -> list[str]:
        return list(node.input[1:] if node.op_type == "MatMulNBits" else node.input[:2])

    def _raw(self, name: str) -> np.ndarray:
        """uint8 [bytes] of an initializer, mapped where it is external."""
        tensor = self.tensors[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.frombuffer(tensor.raw_data, np.uint8)
        try:
            return self._beside({entry.key: entry.value for entry in tensor.external_data})
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"the numbers of {name} cannot be read: {error}", where=self.path) from None

    def _beside(self, entries: dict[str, str]) -> np.ndarray:
        """uint8 [bytes] of a file beside the graph's, or in a folder beside it."""
        location = entries["location"]
        check_name(location, self.path)
        offset, length = entries.get("offset", "0"), entries["length"]
        for number in (offset, length):
            if not (number.isascii() and number.isdecimal() and len(number) < MOST_DIGITS):
                raise ValueError(f"{number[:MOST_DIGITS]!r} is no place in a file")
        path = check_regular(self.path.parent / location)
        if int(offset) + int(length) > path.stat().st_size:
            raise ValueError(f"they end behind the end of {location}")
        return np.memmap(path, np.uint8, "r", int(offset), (int(length),))

    def _floats(self, name: str) -> np.ndarray:
        name = self._sources.get(name, name)
        return self._raw(name).view(_WIDTHS[self.tensors[name].data_type])

    def _nbits(self, node: NodeProto, attributes: dict[str, int]) -> HeldWeight:
        rows, columns, bits, size = (attributes[key] for key in ("N", "K", "bits", "block_size"))
        if bits not in (4, 8) or min(rows, columns, size) < 1 or max(rows, columns, size) >= 1 << 31:
            raise ValueError(f"{rows} x {columns} codes of {bits} bits in blocks of {size}")
        blocks = -(-columns // size)
        whole = unpack(self._raw(node.input[1]).reshape(rows, -1), bits, blocks * size)
        scales = self._floats(node.input[2]).reshape(rows, blocks)
        zeros = None
        if len(node.input) > 3:
            zeros = unpack(self._raw(node.input[3]).reshape(rows, -1), bits, blocks)
        nothing = 2 ** (bits - 1) if zeros is None else zeros[:, -1:]
        return HeldWeight(whole[:, :columns], scales, zeros, bits, bool((whole[:, columns:] != nothing).any()))

    def _dequantized(self, node: NodeProto) -> HeldWeight:
        tensor = self.tensors[node.input[0]]
        columns, rows = tensor.dims
        raw, bits = self._raw(node.input[0]), 4 if tensor.data_type == TensorProto.INT4 else 8
        codes = unpack(raw, bits, rows * columns).reshape(columns, rows) ^ (8 if bits == 4 else 128)
        zeros = None
        if len(node.input) > 2:  # NPUs would compute wrongly with them, so none is right
            zeros = self.array(node.input[2]).reshape(-1, rows).T
        scales = self._floats(node.input[1])
        return HeldWeight(codes.T, scales.reshape(-1, rows).T, zeros, bits)
