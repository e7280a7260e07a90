"""A debug build of a .tflite file: every block's output is an output of both signatures too.

The flatbuffer in front is read, extended and written anew; the weights behind it are copied as they are, and
the offsets that point at them moved by as much as the flatbuffer grew.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Sequence
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
    names = [block_output(layer) for layer in range(artifact.model.num_layers)]
    with source.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # the model's arrays look into it
        model: Any = schema.ModelT.InitFromPackedBuf(data, 0)
        stored = [buffer for buffer in model.buffers if buffer.offset > 1]
        begin = min(buffer.offset for buffer in stored)
        for signature in model.signatureDefs:
            graph = model.subgraphs[signature.subgraphIndex]
            indices = {tensor.name.decode(): index for index, tensor in enumerate(graph.tensors)}
            for name in (*names, *(wish for wish in values if wish in indices and wish not in names)):
                if name not in indices:
                    raise InputError(f"the graph has no value {name}", where=source, fix="export it again")
                entry = schema.TensorMapT()
                entry.name, entry.tensorIndex = name, indices[name]
                signature.outputs.append(entry)
                graph.outputs = [*graph.outputs, indices[name]]
        start = -(-len(_packed(model)) // ALIGNMENT) * ALIGNMENT
        for buffer in stored:
            buffer.offset += start - begin
        with target.open("wb") as out:
            out.write(_packed(model))
            out.seek(start)
            file.seek(begin)
            shutil.copyfileobj(file, out, 2**22)


def _packed(model: Any) -> bytes:
    builder = flatbuffers.Builder(2**16)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())
