"""The cache as onnxruntime-genai 0.18 hands it to a pipeline: one tensor that comes in whole and goes out whole.

    past_keys.N   [1, kv_heads, C, head_dim]  =  [1, kv_heads, head_dim, C] read row by row
                  -> without its oldest T slots -> behind them the step's own -> keys.N, of the same shape

C = context, T = tokens of the step. So the newest slot is always the last, which is where genai's mask has it.

Genai 0.18 has a sliding cache of its own, uint8, and takes it for models of one session alone
(`UsesNonRewindableWindowedKeyValueCache` is false for every pipeline). To a pipeline it gives one buffer a layer for
what comes in and what goes out, of the shape that the first layer's keys declare, for values too. So both declare the
same, with the slots on the third axis, which genai takes for their number; keys are held in it with other axes, since
the cache is never turned (`export/lowering/decoder.py`). The buffer may be one, because nothing of the past is read
behind the slice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bluelm.config import ModelConfig
from export.lowering.decoder import KeysValues, Past
from export.lowering.ops import Ops
from export.onnx.ops import OnnxOps, Symbol


@dataclass
class Slid:
    """A layer's whole cache, keys [1, kv_heads, head_dim, C] and values [1, kv_heads, C, head_dim].

    Attributes:
        seen: what it is once a step's own keys and values have slid in; the step adds it.
    """

    before: KeysValues[Symbol]
    seen: list[KeysValues[Symbol]] = field(default_factory=list[KeysValues[Symbol]])

    def then(self, ops: Ops[Symbol], new: KeysValues[Symbol]) -> KeysValues[Symbol]:
        """Without the oldest slots, and with the step's own behind the rest."""
        context, tokens = self.before.keys.shape[3], new.keys.shape[3]
        rest = KeysValues(
            ops.slice(self.before.keys, 3, tokens, context), ops.slice(self.before.values, 2, tokens, context)
        )
        self.seen.append(rest.then(ops, new))
        return self.seen[-1]


class Sliding:
    """The cache slides through each step (`export.onnx.decoder.Border`)."""

    def past(self, ops: OnnxOps, config: ModelConfig, layer: int, tokens: int, context: int) -> Slid:
        heads, size = config.num_kv_heads, config.head_dim
        shape = (1, heads, context, size)
        keys = ops.cache_input(f"past_keys.{layer}", shape, f"layers.{layer}.keys")
        values = ops.cache_input(f"past_values.{layer}", shape, f"layers.{layer}.values")
        return Slid(KeysValues(ops.reshape(keys, (1, heads, size, context)), values))

    def give(
        self, ops: OnnxOps, config: ModelConfig, layer: int, past: Past[Symbol] | None, new: KeysValues[Symbol]
    ) -> None:
        assert isinstance(past, Slid)
        (seen,) = past.seen
        ops.cache_output(ops.reshape(seen.keys, seen.values.shape), f"keys.{layer}")
        ops.cache_output(seen.values, f"values.{layer}")


SLIDING = Sliding()
