"""Reading a .tflite back with the schema's own classes: its tables, and quantized weights as codes and scales."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema

from bluelm.errors import InputError
from bluelm.system.reading import open_regular
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.artifacts.tables import read_tables
from export.litert.file import IDENTIFIER, TYPES, Type

ARRAYS = {number: dtype for dtype, number in TYPES.items()}


def _complete(model: Any) -> Any:
    """The same tables, of which none that every file has is missing.

    Raises:
        ValueError: one is.
    """
    if not model.buffers or not model.subgraphs or model.signatureDefs is None:
        raise ValueError("it has no buffers, no subgraphs or no signatures")
    for graph in model.subgraphs:
        if graph.tensors is None or any(tensor.name is None or tensor.shape is None for tensor in graph.tensors):
            raise ValueError("it has tensors without name or shape")
    for entry in model.signatureDefs:
        maps = None if entry.inputs is None or entry.outputs is None else (*entry.inputs, *entry.outputs)
        if maps is None or entry.signatureKey is None or any(one.name is None for one in maps):
            raise ValueError("it has signatures without names")
    return model


class LitertFile:
    """A file's tables (`ModelT` of the schema) and, when asked for, its constants; the file is mapped, not read.

    Attributes:
        model: all but the buffers' contents.
        data: its bytes.
    """

    def __init__(self, path: Path, blocks: int | None = None, begin: int = 0, size: int = 0) -> None:
        """Read the tables of a file that holds so many blocks at most, where that is known.

        Args:
            begin, size: of its bytes in the file `path`, where that holds more; `begin` is that of a page.

        Raises:
            InputError: no .tflite, or a damaged one.
        """
        self.path = path
        try:
            with open_regular(path) as file:
                self.data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=begin)
            if self.data[4:8] != IDENTIFIER:
                raise ValueError("its first bytes are not those of one")
            read = schema.ModelT.InitFromObj
            tables = read_tables(lambda: read(schema.Model.GetRootAs(self.data)), len(self.data), blocks)
            self.model: Any = _complete(tables)
        except (OSError, ValueError) as error:
            raise InputError(f"not a .tflite file: {error}", where=path, fix="export it again") from None

    def output(self, signature: str, name: str) -> Any:
        """The tensor that a signature gives by this name.

        Raises:
            InputError: it gives none.
        """
        for entry in self.model.signatureDefs:
            for one in entry.outputs if entry.signatureKey.decode() == signature else ():
                if one.name.decode() == name:
                    return self.model.subgraphs[entry.subgraphIndex].tensors[one.tensorIndex]
        raise InputError(f"{signature} gives no {name}", where=self.path, fix="export it again")

    def constants(self) -> Iterator[tuple[str, Any, Any]]:
        """Name, tensor and subgraph of every constant; those that are the same bytes in both graphs once."""
        seen: set[tuple[object, ...]] = set()
        for graph in self.model.subgraphs:
            for tensor in graph.tensors:
                how = tensor.quantization
                parts = [getattr(how, name, None) for name in ("scale", "zeroPoint")]  # in the tables themselves
                apart = [b"" if part is None else np.asarray(part).tobytes() for part in parts]
                scales = getattr(getattr(how, "details", None), "scales", -1)
                name = tensor.name.decode(errors="replace")
                key = (name, tensor.buffer, scales, *apart)
                if tensor.buffer and key not in seen:
                    seen.add(key)
                    yield name, tensor, graph

    def content(self, buffer: int) -> bytes:
        """The bytes of a buffer, which lie behind the tables."""
        entry = self.model.buffers[buffer]
        return self.data[entry.offset : entry.offset + entry.size]

    def array(self, tensor: Any) -> np.ndarray | None:
        """A constant of float32, float16, int32 or int8; None where its bytes do not fit its type and shape."""
        data, dtype = self.content(tensor.buffer), ARRAYS.get(tensor.type)
        shape = tuple(int(size) for size in tensor.shape)
        if dtype is None or len(data) != int(np.prod(shape)) * dtype.itemsize:
            return None
        return np.frombuffer(data, dtype).reshape(shape)

    def weight(self, tensor: Any, graph: Any) -> QuantizedTensor:
        """A quantized weight [out, in] of a subgraph. Scales that are no float16s stay float32.

        Raises:
            InputError: one that nobody reads as codes and scales.
        """
        try:
            return self._weight(tensor, graph)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(f"a weight cannot be read: {error}", where=self.path, fix="export it again") from None

    def _weight(self, tensor: Any, graph: Any) -> QuantizedTensor:
        rows, columns = (int(size) for size in tensor.shape)
        data = np.frombuffer(self.content(tensor.buffer), np.uint8)
        bits = 4 if tensor.type == Type.INT4 else 8
        if bits == 4:
            codes = np.stack([data & 15, data >> 4], axis=-1).reshape(rows, columns) ^ 8  # signed -> unsigned
        else:
            codes = data.reshape(rows, columns) ^ 128
        details = tensor.quantization.details
        if details is None:
            scales, group = np.array(tensor.quantization.scale, np.float32).reshape(rows, 1), -1
            moved = np.array(tensor.quantization.zeroPoint).reshape(rows, 1)
        else:
            held = self.content(graph.tensors[details.scales].buffer)
            scales, group = np.frombuffer(held, np.float16).reshape(rows, -1).copy(), int(details.blockSize)
            moved = np.zeros(scales.shape)
            if details.zeroPoints != -1:
                raise ValueError("blocks with zero points")
        zeros = torch.from_numpy((moved + 2 ** (bits - 1)).astype(np.uint8))
        exact = torch.from_numpy(scales.astype(np.float16))
        kept = exact if bool((exact.numpy() == scales).all()) else torch.from_numpy(scales)
        return QuantizedTensor(torch.from_numpy(codes.copy()), kept, zeros, bits, group)


@dataclass(frozen=True)
class Layouts(QuantizedCheckpoint):
    """The checkpoint with weights of the shapes, widths and groups that a file has, and no numbers in them."""

    tensors: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(quantized: QuantizedCheckpoint, file: LitertFile) -> Layouts:
        held = {part.name: getattr(quantized, part.name) for part in fields(QuantizedCheckpoint)}
        tensors = {name: tensor for name, tensor, _ in file.constants() if tensor.type in (Type.INT4, Type.INT8)}
        for name in [name for name in tensors if not _is_layout(tensors[name], quantized, name)]:
            del tensors[name]
        return Layouts(**held, tensors=tensors)

    def ordered(self, name: str) -> OrderedWeight:
        if name not in self.tensors:
            return super().ordered(name)
        tensor = self.tensors[name]
        (rows, columns), bits = map(int, tensor.shape), 4 if tensor.type == Type.INT4 else 8
        details = tensor.quantization.details
        size = -1 if details is None else int(details.blockSize)
        groups = 1 if size == -1 else columns // size
        codes = torch.zeros(1, dtype=torch.uint8).expand(rows, columns)  # one byte
        scales = torch.ones(1, dtype=torch.float16).expand(rows, groups)
        zeros = torch.full((1,), 2 ** (bits - 1), dtype=torch.uint8).expand(rows, groups)
        return OrderedWeight(QuantizedTensor(codes, scales, zeros, bits, size))


def _is_layout(tensor: Any, quantized: QuantizedCheckpoint, name: str) -> bool:
    """Whether a tensor has the shape of the weight of its name, and groups that fit it: others are told by their
    numbers, and nothing is made in their size."""
    details = tensor.quantization and tensor.quantization.details
    size = tensor.shape[-1] if not details and len(tensor.shape) else getattr(details, "blockSize", 0)
    info = quantized.linears.get(EMBED if name == HEAD and HEAD not in quantized.linears else name)
    return info is not None and tuple(tensor.shape) == tuple(info.shape) and size > 0 and info.shape[1] % size == 0


@dataclass(frozen=True)
class LitertContents:
    """Quantized weights by tensor name, and the inputs and outputs of each signature."""

    linears: dict[str, QuantizedTensor]
    signatures: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


def read(path: Path) -> LitertContents:
    """Parse the file `path`; all weights at once.

    Raises:
        InputError: as `LitertFile` and its `weight`.
    """
    file = LitertFile(path)
    linears: dict[str, QuantizedTensor] = {}
    for graph in file.model.subgraphs:
        for tensor in graph.tensors:
            if tensor.type in (Type.INT4, Type.INT8) and tensor.buffer:
                linears[tensor.name.decode()] = file.weight(tensor, graph)
    signatures = {
        entry.signatureKey.decode(): (
            tuple(one.name.decode() for one in entry.inputs),
            tuple(one.name.decode() for one in entry.outputs),
        )
        for entry in file.model.signatureDefs
    }
    return LitertContents(linears, signatures)
