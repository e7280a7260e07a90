"""A debug build of a .tflite file: every block's output is an output of both signatures too.

The flatbuffer in front is read, extended and written anew; the weights behind it are copied as they are, and
the offsets that point at them moved by as much as the flatbuffer grew.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flatbuffers

from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from export.litert.file import ALIGNMENT, IDENTIFIER, schema
from export.lowering.decoder import block_output


def open_up(artifact: Artifact, source: Path, target: Path, values: Sequence[str]) -> None:
    """Write `source` to `target` with the stream behind every block among the outputs of each signature.

    Args:
        values: more values of the lowered decoder, shown where a subgraph has them.

    Raises:
        InputError: a subgraph has no such stream.
    """
    with source.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    show(data, target, source, artifact.model.num_layers, values)


def show(data: mmap.mmap, target: Path, source: Path, blocks: int, values: Sequence[str]) -> None:
    """The same of the bytes of a .tflite in the file `source`."""
    names = [block_output(layer) for layer in range(blocks)]

    def change(model: Any) -> None:
        for signature in model.signatureDefs:
            graph = model.subgraphs[signature.subgraphIndex]
            indices = {tensor.name.decode(): index for index, tensor in enumerate(graph.tensors)}
            for name in (*names, *(wish for wish in values if wish in indices and wish not in names)):
                if name not in indices:
                    raise InputError(f"the graph has no value {name}", where=source, fix="export it again")
                add_output(model, signature, name, indices[name])

    rewrite(data, target, change)


def add_output(model: Any, signature: Any, name: str, index: int) -> None:
    """One more of a signature's and its subgraph's outputs."""
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    signature.outputs.append(entry)
    graph = model.subgraphs[signature.subgraphIndex]
    graph.outputs = [*graph.outputs, index]


def rewrite(data: mmap.mmap, target: Path, change: Callable[[Any], None]) -> None:
    """Write a .tflite with other tables: `change` is given its `ModelT`, whose arrays look into `data`."""
    model: Any = schema.ModelT.InitFromPackedBuf(data, 0)
    stored = [buffer for buffer in model.buffers if buffer.offset > 1]
    begin = min(buffer.offset for buffer in stored)
    change(model)
    start = -(-len(_packed(model)) // ALIGNMENT) * ALIGNMENT
    for buffer in stored:
        buffer.offset += start - begin
    with target.open("wb") as out:
        out.write(_packed(model))
        out.seek(start)
        data.seek(begin)
        shutil.copyfileobj(data, out, 2**22)


def _packed(model: Any) -> bytes:
    builder = flatbuffers.Builder(2**16)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())
