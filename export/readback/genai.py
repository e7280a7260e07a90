"""onnx-genai, read back."""

from __future__ import annotations

from collections.abc import Iterator

from compress.store import EMBED, QuantizedCheckpoint
from export.artifact import Artifact
from export.onnx_reader import OnnxWeights, Stored
from export.packing import unpack
from export.readback.held import same
from export.readback.items import linear_names


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Weights of q, k and v may be one matrix; the table lies in the graph."""
    graph = OnnxWeights(artifact.path("model"))
    for name in linear_names(quantized):
        wanted, place, _ = quantized.linear(name), *name.rpartition(".")[::2]
        packed = f"{place}.qkv"
        if name in graph:
            found = graph.read(name)
        elif packed in graph and name.endswith(("q_proj", "k_proj", "v_proj")):
            heights = [quantized.linears[f"{place}.{kind}_proj"].shape[0] for kind in "qkv"]
            at = "qkv".index(name[-6])
            start = sum(heights[:at])
            whole = graph.read(packed)
            part = slice(start, start + heights[at])
            zeros = None if whole.zeros is None else whole.zeros[part]
            found = Stored(whole.codes[part], whole.scales[part], zeros, whole.bits)
        else:
            yield name
            continue
        if not same(wanted, found):
            yield name
    table, packed = quantized.embed(), graph.initializer("embed.codes")  # uint8 [rows, hidden * bits / 8]
    codes = unpack(packed, table.bits, table.shape[1])
    if not same(table, Stored(codes, graph.initializer("embed.scales"), None, table.bits)):
        yield EMBED
