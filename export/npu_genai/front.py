"""The first stage, on the CPU: what onnxruntime-genai knows of a step as what the NPU's graphs take.

    input_ids int32 [1, T]       -> their rows of the embedding table     hidden float32 [1, T, hidden]
    position_ids int32 [1, T]    -> the same numbers                      positions int32 [T]
    attention_mask int32 [1, C]  -> 0 where a token may look, else        mask float32 [1, 1, T, C]
                                    the mask's value

The mask that genai gives is 1 for slots that hold a token, which are the last ones, and 0 for all before them. So the
number of ones before a slot is its token's position, and a token sees the slots of positions up to its own. T is free:
the same stage serves prompts and single tokens. Codes and scales of the table are those in embedding.safetensors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, TensorProto

from bluelm.errors import TargetError
from compress.checkpoint.quantized import QuantizedTensor
from export.artifacts.embedding import places
from export.onnx.decoder import IR_VERSION, OPSETS
from export.onnx.graph import NoFile, OnnxGraph, StoredAt

CONTRIB = "com.microsoft"
TABLE = "embed"


def check_table(table: QuantizedTensor) -> None:
    """TargetError unless the stage can hold the embedding table."""
    if table.groups != 1 or not table.symmetric:
        raise TargetError("the embedding needs one scale a row and no zero points", fix="quantize with embed_bits 8")


def front(table: QuantizedTensor, embedding: Path, context: int, mask_value: float) -> ModelProto:
    """The stage; its table lies in the file `embedding`, which is beside it.

    Raises:
        TargetError: the table has groups or zero points. InputError: the file is none of ours.
    """
    check_table(table)
    graph = OnnxGraph("front", _beside(table, embedding))
    for name, width in (("input_ids", "T"), ("position_ids", "T"), ("attention_mask", context)):
        graph.input(name, TensorProto.INT32, (1, width))
    _rows(graph, table)
    graph.node("Reshape", ["position_ids", _index(graph, -1)], "positions")
    _mask(graph, mask_value)
    graph.output("hidden", TensorProto.FLOAT, (1, "T", table.shape[1]))
    graph.output("positions", TensorProto.INT32, ("T",))
    graph.output("mask", TensorProto.FLOAT, (1, 1, "T", context))
    return graph.model(OPSETS, IR_VERSION)


def _beside(table: QuantizedTensor, embedding: Path) -> NoFile:
    """Where codes and scales lie in a file that `write_embedding` made."""
    weights, where = NoFile(embedding), places(embedding)
    kind = TensorProto.FLOAT if table.scales.dtype == torch.float32 else TensorProto.FLOAT16
    shapes = {"codes": (table.shape[0], table.shape[1] * table.bits // 8), "scales": (table.shape[0], 1)}
    for part, dtype in (("codes", TensorProto.UINT8), ("scales", kind)):
        weights.tensors[f"{TABLE}.{part}"] = StoredAt(dtype, shapes[part], *where[part])
    return weights


def _rows(graph: OnnxGraph, table: QuantizedTensor) -> None:
    codes, scales = (graph.stored(f"{TABLE}.{part}") for part in ("codes", "scales"))
    if table.scales.dtype != torch.float32:
        graph.node("Cast", [scales], f"{scales}.float32", to=TensorProto.FLOAT)
        scales = f"{scales}.float32"
    block = 1 << (table.shape[1] - 1).bit_length()  # must be a power of two; the only block of a row may be short
    layout = {"bits": table.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    graph.node("GatherBlockQuantized", [codes, "input_ids", scales], "hidden", domain=CONTRIB, **layout)


def _mask(graph: OnnxGraph, mask_value: float) -> None:
    last = graph.initializer("zero.int64.1", np.array(1, np.int64))
    graph.node("Cast", ["attention_mask"], "held", to=TensorProto.BOOL)  # [1, C]
    graph.node("CumSum", ["attention_mask", last], "position", exclusive=1)  # [1, C]
    graph.node("Unsqueeze", ["position_ids", _index(graph, 2)], "own")  # [1, T, 1]
    graph.node("LessOrEqual", ["position", "own"], "before")  # [1, T, C]
    graph.node("And", ["before", "held"], "seen")
    graph.node("Where", ["seen", _number(graph, 0.0), _number(graph, mask_value)], "scores")
    graph.node("Unsqueeze", ["scores", _index(graph, 0)], "mask")


def _index(graph: OnnxGraph, number: int) -> str:
    return graph.initializer(f"index.{number}", np.array([number], np.int64))


def _number(graph: OnnxGraph, number: float) -> str:
    """A float32, whose name says its bits."""
    value = np.array(number, np.float32)
    return graph.initializer(f"scale.{int(value.view(np.uint32)):08x}", value)
