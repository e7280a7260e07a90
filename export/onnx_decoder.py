"""The two graphs of an ONNX artifact, prefill and decode, emitted from the lowered decoder.

Both have these inputs and outputs, T = chunk or 1, C = context:

    hidden        float32 [1, T, hidden]                      rows of the embedding table
    positions     int32 [T]                                   below C
    mask          float32 [1, 1, T, C]                        0, or the artifact's mask_value
    past_keys.N   cache [1, kv_heads, head_dim, C - T]        the first C - T slots of layer N
    past_values.N cache [1, kv_heads, C - T, head_dim]
    logits        float32 [1, T, vocab]
    keys.N        cache [1, kv_heads, head_dim, T]            of the step's own tokens, for the host to store
    values.N      cache [1, kv_heads, T, head_dim]

Where T = C there are no past inputs. `cache` is float32 on CPUs, int16 codes on NPUs, which the host only
carries. The last T columns of the mask are the step's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onnx import TensorProto

from bluelm.config import ModelConfig
from bluelm.progress import Progress
from export import lowered
from export.encoding import Encoding
from export.lowered import KeysValues
from export.onnx_graph import OnnxGraph, WeightFile
from export.onnx_ops import OnnxOps, Symbol

OPSETS = {"": 23, "com.microsoft": 1}
IR_VERSION = 11
WEIGHTS = "weights.bin"
GRAPHS = ("prefill", "decode")


def write_graphs(
    folder: Path,
    config: ModelConfig,
    context: int,
    chunk: int,
    mask_value: float,
    backend: Callable[[OnnxGraph], OnnxOps],
    progress: Progress,
) -> None:
    """Write prefill.onnx, decode.onnx and the weights that both point at into `folder`."""
    with (
        WeightFile(folder / WEIGHTS) as weights,
        progress.task("lower to ONNX", len(GRAPHS)) as task,
    ):
        for name, tokens in zip(GRAPHS, (chunk, 1), strict=True):
            task.advance(note=name)
            graph = OnnxGraph(name, weights)
            _emit(backend(graph), config, tokens, context, mask_value)
            graph.save(folder / f"{name}.onnx", OPSETS, IR_VERSION)


def _emit(ops: OnnxOps, config: ModelConfig, tokens: int, context: int, mask_value: float) -> None:
    hidden = ops.activation_input("hidden", (1, tokens, config.hidden_size))
    ops.graph.input("positions", TensorProto.INT32, (tokens,))
    mask_encoding = Encoding.of_range(mask_value, 0.0)
    mask = ops.activation_input("mask", (1, 1, tokens, context), mask_encoding)
    slots = context - tokens
    past = [_past(ops, config, layer, slots) if slots else None for layer in range(config.num_layers)]
    positions = Symbol("positions", (tokens,))
    logits, new = lowered.decoder(ops, config, hidden, positions, mask, past, context)
    ops.activation_output(logits, "logits")
    for layer, keys_values in enumerate(new):
        ops.cache_output(keys_values.keys, f"keys.{layer}")
        ops.cache_output(keys_values.values, f"values.{layer}")


def _past(ops: OnnxOps, config: ModelConfig, layer: int, slots: int) -> KeysValues[Symbol]:
    heads, size = config.num_kv_heads, config.head_dim
    return KeysValues(
        ops.cache_input(f"past_keys.{layer}", (1, heads, size, slots), f"layers.{layer}.keys"),
        ops.cache_input(f"past_values.{layer}", (1, heads, slots, size), f"layers.{layer}.values"),
    )
