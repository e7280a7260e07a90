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

A model in several parts (`export/lowering/parts.py`) has the two graphs for each: prefill_1.onnx, decode_1.onnx,
weights_1.bin and so on. All but the first take the stream `layers.N.output` float32 [1, T, hidden] for `hidden`, all
but the last give it for `logits`; each has the caches of its own blocks, and a head alone takes no positions and no
mask.
Where T = C there are no past inputs. `cache` is float32 on CPUs, int16 codes on NPUs, which the host only
carries. The last T columns of the mask are the step's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from onnx import TensorProto

from bluelm.config import ModelConfig
from bluelm.system.progress import Progress
from export.lowering import decoder as lowered
from export.lowering.decoder import KeysValues, Past
from export.lowering.encoding import Encoding
from export.lowering.parts import Part, whole
from export.onnx.graph import OnnxGraph, WeightFile
from export.onnx.ops import OnnxOps, Symbol

OPSETS = {"": 23, "com.microsoft": 1}
IR_VERSION = 11
WEIGHTS = "weights.bin"
GRAPHS = ("prefill", "decode")


class Border(Protocol):
    """How a layer's cache comes into a graph, and goes out of it."""

    def past(self, ops: OnnxOps, config: ModelConfig, layer: int, tokens: int, context: int) -> Past[Symbol] | None:
        """What a step of `tokens` finds of the layer; None: nothing is cached before it."""
        ...

    def give(
        self, ops: OnnxOps, config: ModelConfig, layer: int, past: Past[Symbol] | None, new: KeysValues[Symbol]
    ) -> None:
        """Make outputs of what the next step has to find; `new` are the step's own keys and values."""
        ...


class HostKept:
    """The host keeps the cache: the first C - T slots come in, a step's own keys and values go out."""

    def past(
        self, ops: OnnxOps, config: ModelConfig, layer: int, tokens: int, context: int
    ) -> KeysValues[Symbol] | None:
        heads, size, slots = config.num_kv_heads, config.head_dim, context - tokens
        if slots == 0:
            return None
        return KeysValues(
            ops.cache_input(f"past_keys.{layer}", (1, heads, size, slots), f"layers.{layer}.keys"),
            ops.cache_input(f"past_values.{layer}", (1, heads, slots, size), f"layers.{layer}.values"),
        )

    def give(
        self, ops: OnnxOps, config: ModelConfig, layer: int, past: Past[Symbol] | None, new: KeysValues[Symbol]
    ) -> None:
        ops.cache_output(new.keys, f"keys.{layer}")
        ops.cache_output(new.values, f"values.{layer}")


HOST_KEPT = HostKept()


def write_graphs(
    folder: Path,
    config: ModelConfig,
    context: int,
    chunk: int,
    mask_value: float,
    backend: Callable[[OnnxGraph], OnnxOps],
    progress: Progress,
    parts: Sequence[Part] = (),
    border: Border = HOST_KEPT,
) -> None:
    """Write the graphs of each part (default: the whole model) and the weights that they point at into `folder`."""
    parts = parts or [whole(config.num_layers)]
    with progress.task("lower to ONNX", len(GRAPHS) * len(parts)) as task:
        for index, part in enumerate(parts):
            with WeightFile(folder / part_file(WEIGHTS, index, len(parts))) as weights:
                for graph in emitted(weights, config, part, context, chunk, mask_value, backend, border):
                    file = part_file(f"{graph.name}.onnx", index, len(parts))
                    task.advance(note=file)
                    graph.save(folder / file, OPSETS, IR_VERSION)


def emitted(
    weights: WeightFile,
    config: ModelConfig,
    part: Part,
    context: int,
    chunk: int,
    mask_value: float,
    backend: Callable[[OnnxGraph], OnnxOps],
    border: Border = HOST_KEPT,
) -> Iterator[OnnxGraph]:
    """Prefill and decode of one part; both point into `weights`."""
    for name, tokens in zip(GRAPHS, (chunk, 1), strict=True):
        graph = OnnxGraph(name, weights)
        _emit(backend(graph), config, part, tokens, context, mask_value, border)
        yield graph


def part_file(name: str, index: int, parts: int) -> str:
    """A file's name in an artifact of so many parts: prefill.onnx, or prefill_1.onnx, prefill_2.onnx ..."""
    stem, dot, suffix = name.partition(".")
    return name if parts == 1 else f"{stem}_{index + 1}{dot}{suffix}"


def _emit(
    ops: OnnxOps, config: ModelConfig, part: Part, tokens: int, context: int, mask_value: float, border: Border
) -> None:
    name = "hidden" if part.embeds else lowered.block_output(part.first - 1)
    x = ops.activation_input(name, (1, tokens, config.hidden_size))
    if part.layers:
        ops.graph.input("positions", TensorProto.INT32, (tokens,))
        mask = ops.activation_input("mask", (1, 1, tokens, context), Encoding.of_range(mask_value, 0.0))
    else:
        mask = x  # a head alone has no attention
    past = [border.past(ops, config, layer, tokens, context) for layer in part.layers]
    positions = Symbol("positions", (tokens,))
    out, new = lowered.part(ops, config, part, x, positions, mask, past, context)
    ops.activation_output(out, "logits" if part.heads else lowered.block_output(part.last - 1))
    for layer, before, own in zip(part.layers, past, new, strict=True):
        border.give(ops, config, layer, before, own)
