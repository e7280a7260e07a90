"""The graph as LiteRT-LM drives it: signatures `prefill_N` and `decode`, which take token ids and whole KV caches.

    tokens int32 [1, T], input_pos int32 [T], mask float32 [1, 1, T, S], kv_cache_k_L, kv_cache_v_L of each layer
    -> the caches under the same names, with the step's own slots written at input_pos[0]; of `decode` logits as well

LiteRT-LM finds inputs and outputs by these names. A mask is 0, or deep, and added to the scores. LiteRT-LM pads a
prompt to a whole chunk, and refuses one whose last chunk leaves the cache: so that has a chunk's slots more than the
context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.litert.export import check_weight
from export.litert.file import LitertModel, Type
from export.litert.ops import LitertOps, Symbol
from export.lowering.decoder import KeysValues, part
from export.lowering.ops import Ops
from export.lowering.parts import Part

DECODE = "decode"
HIDDEN = "hidden"
"""The looked-up rows, [T, hidden]."""
KEYS, VALUES = "kv_cache_k_", "kv_cache_v_"
SLOT_AXIS = {KEYS: 3, VALUES: 2}


def prefill(chunk: int) -> str:
    """Name of the signature for `chunk` tokens."""
    return f"prefill_{chunk}"


def slots(context: int, chunk: int) -> int:
    """Of the cache."""
    return context + chunk


def lower(model: LitertModel, quantized: QuantizedCheckpoint, context: int, chunk: int) -> Iterator[str]:
    """Put both signatures into `model`; gives the name of each before it is made.

    Raises:
        TargetError: LiteRT has no kernel for a weight (says which).
    """

    def read(name: str) -> QuantizedTensor:
        weight = quantized.linear(name)
        check_weight(weight, name)
        if name == EMBED and weight.groups != 1:
            fix = "quantize with bluelm-export"
            raise TargetError("LiteRT looks rows up that have one scale each", where=name, fix=fix)
        return weight

    for name, tokens in ((prefill(chunk), chunk), (DECODE, 1)):
        yield name
        graph = model.subgraph(name)
        ops = _Ops(graph, read, quantized.vector, quantized.config.rms_norm_eps, Type.FLOAT32)
        ops.shares_table = HEAD not in quantized.linears
        inputs, outputs = _emit(ops, quantized.config, tokens, context, slots(context, chunk), heads=name == DECODE)
        model.signature(name, graph, inputs, outputs)


class _Ops(LitertOps):
    """A head that is the embedding's table reads it there."""

    shares_table = False

    def linear(self, x: Symbol, weight: str, name: str) -> Symbol:
        return super().linear(x, EMBED if weight == HEAD and self.shares_table else weight, name)


@dataclass
class _Slots:
    """A layer's cache, which the graph writes: keys [1, kv_heads, size, S], values [1, kv_heads, S, size]."""

    keys: Symbol
    values: Symbol
    starts: KeysValues[Symbol]
    layer: int

    def then(self, ops: Ops[Symbol], new: KeysValues[Symbol]) -> KeysValues[Symbol]:
        assert isinstance(ops, LitertOps)
        at = f"layers.{self.layer}"
        self.keys = ops.write_slice(self.keys, new.keys, self.starts.keys, f"{at}.cached_keys")
        self.values = ops.write_slice(self.values, new.values, self.starts.values, f"{at}.cached_values")
        return KeysValues(self.keys, self.values)


def _emit(
    ops: LitertOps, config: ModelConfig, tokens: int, context: int, slots: int, heads: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """The graph of `tokens` tokens; its inputs and outputs by name."""
    kv_heads, size = config.num_kv_heads, config.head_dim
    border = {
        "tokens": ops.input("tokens", (1, tokens), Type.INT32),
        "input_pos": ops.input("input_pos", (tokens,), Type.INT32),
        "mask": ops.input("mask", (1, 1, tokens, slots)),
    }
    first = ops.slice(border["input_pos"], 0, 0, 1)
    starts = KeysValues(*(ops.place(first, 4, SLOT_AXIS[kind], f"start.{kind}") for kind in (KEYS, VALUES)))
    past: list[_Slots] = []
    for layer in range(config.num_layers):
        for kind, shape in ((KEYS, (1, kv_heads, size, slots)), (VALUES, (1, kv_heads, slots, size))):
            border[f"{kind}{layer}"] = ops.input(f"{kind}{layer}", shape)
        past.append(_Slots(border[f"{KEYS}{layer}"], border[f"{VALUES}{layer}"], starts, layer))
    x = ops.lookup(EMBED, ops.reshape(border["tokens"], (tokens,)), HIDDEN)
    x = ops.reshape(x, (1, tokens, config.hidden_size))
    held = Part(embeds=True, first=0, last=config.num_layers, heads=heads)
    x, _ = part(ops, config, held, x, border["input_pos"], border["mask"], past, context)
    outputs = {"logits": x.index} if heads else {}
    for layer, cache in enumerate(past):
        outputs |= {f"{KEYS}{layer}": cache.keys.index, f"{VALUES}{layer}": cache.values.index}
    return {name: symbol.index for name, symbol in border.items()}, outputs
