"""Reading a .tflite back with the schema's own classes: signatures, and quantized weights as codes and
scales."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema

from compress.quantized import QuantizedTensor
from export.litert_file import Type


@dataclass(frozen=True)
class Contents:
    """Quantized weights by tensor name, and the inputs and outputs of each signature."""

    linears: dict[str, QuantizedTensor]
    signatures: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


def read(path: Path) -> Contents:
    """Parse the file `path`."""
    data = path.read_bytes()
    model: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))

    def content(index: int) -> bytes:
        buffer = model.buffers[index]
        return data[buffer.offset : buffer.offset + buffer.size]

    linears: dict[str, QuantizedTensor] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.type in (Type.INT4, Type.INT8) and tensor.buffer:
                linears[tensor.name.decode()] = _weight(tensor, graph, content)
    signatures = {
        entry.signatureKey.decode(): (
            tuple(one.name.decode() for one in entry.inputs),
            tuple(one.name.decode() for one in entry.outputs),
        )
        for entry in model.signatureDefs
    }
    return Contents(linears, signatures)


def _weight(tensor: Any, graph: Any, content: Any) -> QuantizedTensor:
    rows, columns = (int(size) for size in tensor.shape)
    data = np.frombuffer(content(tensor.buffer), np.uint8)
    bits = 4 if tensor.type == Type.INT4 else 8
    if bits == 4:
        codes = np.stack([data & 15, data >> 4], axis=-1).reshape(rows, columns) ^ 8  # signed -> unsigned
    else:
        codes = data.reshape(rows, columns) ^ 128
    details = tensor.quantization.details
    if details is None:
        scales, group = np.asarray(tensor.quantization.scale, np.float32).reshape(rows, 1), -1
    else:
        held = content(graph.tensors[details.scales].buffer)
        scales, group = np.frombuffer(held, np.float16).reshape(rows, -1), int(details.blockSize)
    exact = torch.from_numpy(scales.astype(np.float16))
    assert bool((exact.numpy() == scales).all()), tensor.name
    zeros = torch.full(exact.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedTensor(torch.from_numpy(codes.copy()), exact, zeros, bits, group)
