"""onnx-cpu and onnx-npu, read back."""

from __future__ import annotations

from collections.abc import Iterator

from compress.store import QuantizedCheckpoint
from export.artifact import Artifact
from export.onnx_decoder import GRAPHS
from export.onnx_reader import OnnxWeights
from export.readback.held import same, table_faults
from export.readback.items import linear_names


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """onnx-cpu and onnx-npu: prefill and decode, each of one part or several, and the table beside them."""
    prefill, decode = ([OnnxWeights(path) for path in artifact.paths(role)] for role in GRAPHS)
    for name in linear_names(quantized):
        first, second = (next((graph for graph in graphs if name in graph), None) for graphs in (prefill, decode))
        wanted = quantized.ordered(name).weight
        if (
            first is None
            or second is None
            or not same(wanted, first.read(name))
            or (second.place(name) != first.place(name) and not same(wanted, second.read(name)))
        ):
            yield name
    yield from table_faults(artifact, quantized)
