"""Hostile flatbuffers: what is odd in every one, and .tflite files, each made of a valid one."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np

from tests.hostile.texts import SHOUT

Change = Callable[[bytes], bytes]
MANY = 30_000  # references to one table: the square of it would be visited
APART = 1_000_000  # tables of their own, each with nothing


# --- any flatbuffer --------------------------------------------------------------------------------------------------


def poked(at: int, form: str, number: int) -> Change:
    def do(valid: bytes) -> bytes:
        data = bytearray(valid)
        struct.pack_into(form, data, at, number)
        return bytes(data)

    return do


def _root(form: str, number: int, more: int = 0) -> Change:
    """Another number at (or behind) the root table, where the place of its own table of fields stands."""
    return lambda valid: poked(struct.unpack_from("<I", valid)[0] + more, form, number)(valid)


def _fields(number: int) -> Change:
    """Every field of the root at the same place."""

    def do(valid: bytes) -> bytes:
        data = bytearray(valid)
        (root,) = struct.unpack_from("<I", data)
        table = root - struct.unpack_from("<i", data, root)[0]
        for at in range(table + 4, table + struct.unpack_from("<H", data, table)[0], 2):
            struct.pack_into("<H", data, at, number)
        return bytes(data)

    return do


def _vectors(number: int) -> Change:
    """Another length of every vector that the root has."""

    def do(valid: bytes) -> bytes:
        data = bytearray(valid)
        (root,) = struct.unpack_from("<I", data)
        table = root - struct.unpack_from("<i", data, root)[0]
        for at in range(table + 4, table + struct.unpack_from("<H", data, table)[0], 2):
            (field,) = struct.unpack_from("<H", data, at)
            if field:
                (off,) = struct.unpack_from("<I", data, root + field)
                if 4 < off < len(data) - root - field - 4:
                    struct.pack_into("<I", data, root + field + off, number)
        return bytes(data)

    return do


def apart(identifier: bytes, outer: int, inner: int) -> Change:
    """A root, one table in its vector, and in that one's many tables of nothing, each of its own."""
    roots, tables = (struct.pack(f"<HH{field + 1}H", 6 + 2 * field, 8, *[0] * field, 4) for field in (outer, inner))
    parts = [
        struct.pack("<I", 8 + len(roots)) + identifier,
        roots + struct.pack("<iIII", len(roots), 4, 1, 4 + len(tables)),
        tables + struct.pack("<iII", len(tables), 4, APART),
        np.full(APART, 4 * APART + 4, "<u4").tobytes() + struct.pack("<HH", 4, 4),
        (4 + 4 * np.arange(APART)).astype("<i4").tobytes(),
    ]
    return lambda valid: b"".join(parts)


FLAT: dict[str, Change] = {
    "a root behind the end": poked(0, "<I", 2**32 - 1),
    "a root in itself": poked(0, "<I", 0),
    "a root at the end": lambda valid: struct.pack("<I", len(valid) - 4) + valid[4:],
    "fields behind the end": _root("<i", -(2**31)),
    "fields before the start": _root("<i", 2**31 - 1),
    "fields in the root": _root("<i", 0),
    "fields all at one place": _fields(4),
    "fields behind their table": _fields(65535),
    "vectors of 2^32 - 1": _vectors(2**32 - 1),
    "vectors of 2^24": _vectors(2**24),
    "vectors of nothing": _vectors(0),
    "only its first bytes": lambda valid: valid[:8],
    "nothing behind the root's place": lambda valid: valid[:64],
}


# --- .tflite ---------------------------------------------------------------------------------------------------------


def _model(change: Callable[[Any], None]) -> Change:
    """The tables of a file changed, its weights where they were meant to be."""

    def do(valid: bytes) -> bytes:
        from tests.support.edits.litert import rewritten

        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "m.tflite"
            path.write_bytes(valid)
            rewritten(path, lambda model, contents: change(model))
            return path.read_bytes()

    return do


def _tensors(change: Callable[[Any], None]) -> Change:
    def do(model: Any) -> None:
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                change(tensor)

    return _model(do)


def _buffers(offset: int | None, size: int | None) -> Change:
    """Constants that lie elsewhere; the file is not laid out anew."""

    def do(valid: bytes) -> bytes:
        from export.litert.reader import LitertFile
        from tests.support.edits.litert import packed

        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "m.tflite"
            path.write_bytes(valid)
            model = LitertFile(path).model
            for entry in model.buffers[1:]:
                entry.offset, entry.size = offset or entry.offset, size or entry.size
            return packed(model) + valid

    return do


def _shape(*sizes: int) -> Change:
    def change(tensor: Any) -> None:
        if tensor.buffer:
            tensor.shape = list(sizes)

    return _tensors(change)


def _details(name: str, value: int) -> Change:
    """Of weights in blocks."""

    def change(tensor: Any) -> None:
        details = getattr(tensor.quantization, "details", None)
        if details is not None:
            setattr(details, name, value)

    return _tensors(change)


def _operators(change: Callable[[Any], None]) -> Change:
    def do(model: Any) -> None:
        for graph in model.subgraphs:
            for operator in graph.operators:
                change(operator)

    return _model(do)


def _own_output(operator: Any) -> None:
    operator.inputs = [operator.outputs[0]] * len(operator.inputs)


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda table: setattr(table, name, value)


def _graphs(name: str, value: Any) -> Change:
    def do(model: Any) -> None:
        for graph in model.subgraphs:
            setattr(graph, name, value)

    return _model(do)


def _signatures(model: Any) -> None:
    for entry in model.signatureDefs:
        entry.subgraphIndex, entry.signatureKey = 2**32 - 1, SHOUT
        for one in (*entry.inputs, *entry.outputs):
            one.tensorIndex = 2**32 - 1


def _quantization(tensor: Any) -> None:
    if tensor.quantization is not None:
        tensor.quantization.scale, tensor.quantization.zeroPoint = [float("nan")] * 3, [2**62]


def _squared(name: str) -> Change:
    """Many graphs that are one, of many tensors that are one, of one name (or shape) of a megabyte."""

    def do(valid: bytes) -> bytes:
        from ai_edge_litert import schema_py_generated

        schema: Any = schema_py_generated
        builder = flatbuffers.Builder(1 << 20)
        long = builder.CreateString("x" * (1 << 20)) if name == "names" else 0
        schema.TensorStart(builder)
        if long:
            schema.TensorAddName(builder, long)
        tensor = schema.TensorEnd(builder)
        tensors = vector(builder, [tensor] * MANY)
        schema.SubGraphStart(builder)
        schema.SubGraphAddTensors(builder, tensors)
        graph = schema.SubGraphEnd(builder)
        graphs = vector(builder, [graph] * (MANY if name == "graphs" else 1))
        schema.ModelStart(builder)
        schema.ModelAddSubgraphs(builder, graphs)
        builder.Finish(schema.ModelEnd(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    return do


def vector(builder: Any, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in offsets:
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


TFLITE: dict[str, Change] = {
    **FLAT,
    "constants behind the end": _buffers(2**62, None),
    "constants of 2^62 bytes": _buffers(None, 2**62),
    "constants at the end of numbers": _buffers(2**64 - 1, 2**64 - 1),
    "constants that are the tables": _buffers(1, None),
    "a million tensors of nothing": apart(b"TFL3", 2, 0),
    "graphs that are one": _squared("graphs"),
    "names that are one": _squared("names"),
    "shapes of 2^31 - 1": _shape(2**31 - 1, 2**31 - 1),
    "negative shapes": _shape(-1, -4),
    "shapes of no axes": _shape(),
    "shapes of 1000 axes": _shape(*[1] * 1000),
    "shapes with nothing": _shape(0, 4),
    "types that are none": _tensors(_set("type", 99)),
    "types of four bits": _tensors(_set("type", 17)),
    "buffers that are not there": _tensors(_set("buffer", 2**32 - 1)),
    "names that shout": _tensors(_set("name", SHOUT)),
    "no names": _tensors(_set("name", None)),
    "names that are one name": _tensors(_set("name", "x")),
    "no quantization": _tensors(_set("quantization", None)),
    "scales that are none": _tensors(_quantization),
    "scales of no tensor": _details("scales", 2**31 - 1),
    "scales of a negative tensor": _details("scales", -5),
    "blocks of nothing": _details("blockSize", 0),
    "blocks of 2^31 - 1": _details("blockSize", 2**31 - 1),
    "negative blocks": _details("blockSize", -32),
    "operators that read themselves": _operators(_own_output),
    "operators of no tensors": _operators(_set("inputs", [2**31 - 1] * 3)),
    "operators of negative tensors": _operators(_set("inputs", [-7] * 3)),
    "operators of no code": _operators(_set("opcodeIndex", 2**32 - 1)),
    "operators without outputs": _operators(_set("outputs", None)),
    "operators without options": _operators(_set("builtinOptions", None)),
    "no operators": _graphs("operators", None),
    "no tensors": _graphs("tensors", None),
    "no inputs": _graphs("inputs", None),
    "inputs that are not there": _graphs("inputs", [2**31 - 1]),
    "outputs that are not there": _graphs("outputs", [-(2**31)]),
    "no graphs": _model(_set("subgraphs", None)),
    "no signatures": _model(_set("signatureDefs", None)),
    "signatures of no graph": _model(_signatures),
    "no codes of operators": _model(_set("operatorCodes", None)),
}
