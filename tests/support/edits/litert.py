"""Changes of a .tflite file, one place at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated

from export.litert.file import ALIGNMENT, IDENTIFIER
from export.litert.reader import LitertFile

schema: Any = schema_py_generated


Op = schema.BuiltinOperator


Change = Callable[[Any, list[bytearray]], None]


def rewritten(path: Path, change: Change) -> None:
    """The file with other tables or contents; `change` gets the schema's tables, and the bytes of each buffer."""
    file = LitertFile(path)
    contents = [bytearray(file.content(index)) for index in range(len(file.model.buffers))]
    change(file.model, contents)
    buffers = file.model.buffers[1:]
    for entry in buffers:
        entry.offset = entry.size = 2**30  # not left out for being zero
    place = -(-len(packed(file.model)) // ALIGNMENT) * ALIGNMENT
    for entry, content in zip(buffers, contents[1:], strict=True):
        entry.offset, entry.size = place, len(content)
        place += -(-len(content) // ALIGNMENT) * ALIGNMENT
    head = packed(file.model)  # whose arrays lie in the mapped file until then
    with path.open("wb") as out:
        out.write(head)
        for entry, content in zip(buffers, contents[1:], strict=True):
            out.seek(entry.offset)
            out.write(content)


def packed(model: Any) -> bytes:
    builder = flatbuffers.Builder(2**16)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def tensors(model: Any, name: str) -> list[Any]:
    return [one for graph in model.subgraphs for one in graph.tensors if one.name.decode() == name]


def number(name: str, index: int, change: Callable[[np.ndarray], Any]) -> Change:
    """One number of a float32 constant."""

    def damage(model: Any, contents: list[bytearray]) -> None:
        values = np.frombuffer(contents[tensors(model, name)[0].buffer], np.float32)
        values[index] = change(values[index])

    return damage


def byte(name: str, index: int, flip: int) -> Change:
    """Bits of a constant."""

    def damage(model: Any, contents: list[bytearray]) -> None:
        contents[tensors(model, name)[0].buffer][index] ^= flip

    return damage


def row_scale(name: str) -> Change:
    """A scale that lies in the tables, of the second graph alone."""

    def damage(model: Any, contents: list[bytearray]) -> None:
        how = tensors(model, name)[1].quantization
        how.scale = [*how.scale[:5], 1.5 * how.scale[5], *how.scale[6:]]

    return damage


def exchanged(first: str, second: str) -> Change:
    """Two constants in each other's place, for the second graph."""

    def damage(model: Any, contents: list[bytearray]) -> None:
        a, b = tensors(model, first)[1], tensors(model, second)[1]
        a.buffer, b.buffer = b.buffer, a.buffer

    return damage


def operator(kind: int, graph: int, change: Callable[[Any, Any], None]) -> Change:
    """The last operator of a kind."""

    def damage(model: Any, contents: list[bytearray]) -> None:
        codes = [code.builtinCode for code in model.operatorCodes]
        found = [one for one in model.subgraphs[graph].operators if codes[one.opcodeIndex] == kind]
        change(found[-1], model)

    return damage


def soft(entry: Any, model: Any) -> None:
    entry.builtinOptions.beta = 0.5
