"""The decoder as primitive operations: every artifact holds this graph, and `TorchOps` runs it.

One step takes T tokens: T = chunk for prefill, 1 for decode. The host keeps the KV cache: `past` holds its
first C - T slots, the step's own keys and values come behind them, and the mask hides slots that are not
filled. Rope is applied before a key enters the cache, so a slot's place says nothing of its position. Keys
are cached transposed, [1, kv_heads, head_dim, slots]: only the new ones are turned, never the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import numpy as np

from bluelm.block import STREAM, Add, Attend, Linear, Norm, Product, Silu, block_of
from bluelm.config import ModelConfig
from bluelm.rope import rope_table
from export.lowering.ops import Ops, V
from export.lowering.parts import Part, whole


@dataclass(frozen=True)
class KeysValues(Generic[V]):
    """Keys [1, kv_heads, head_dim, slots] after rope, values [1, kv_heads, slots, head_dim], of one layer."""

    keys: V
    values: V

    def then(self, ops: Ops[V], new: KeysValues[V]) -> KeysValues[V]:
        """These and behind them a step's own: what the step sees."""
        keys = ops.concat([self.keys, new.keys], 3)  # [1, kv_heads, size, C]
        return KeysValues(keys, ops.concat([self.values, new.values], 2))  # [1, kv_heads, C, size]


class Past(Protocol[V]):
    """What a layer has cached: `KeysValues` that a host keeps, or slots that a graph writes itself."""

    def then(self, ops: Ops[V], new: KeysValues[V]) -> KeysValues[V]:
        """All that a step sees, its own keys and values among it."""
        ...


@dataclass(frozen=True)
class Rotary(Generic[V]):
    """Rope factors of the step's positions, [1, 1, T, head_dim] each; `sin` is negative in its first half."""

    cos: V
    sin: V


def decoder(
    ops: Ops[V],
    config: ModelConfig,
    x: V,
    positions: V,
    mask: V,
    past: Sequence[Past[V] | None],
    context: int,
) -> tuple[V, list[KeysValues[V]]]:
    """Hidden states to logits.

    Args:
        x: embedded tokens [1, T, hidden], embedding LayerNorm already applied.
        positions: integer [T], below `context`.
        mask: additive [1, 1, T, slots + T].
        past: one `Past` a layer; None where nothing is cached.
        context: rows of the rope tables.

    Returns:
        logits [1, T, vocab], and the step's own `KeysValues` of each layer.
    """
    return part(ops, config, whole(config.num_layers), x, positions, mask, past, context)


def part(
    ops: Ops[V],
    config: ModelConfig,
    held: Part,
    x: V,
    positions: V,
    mask: V,
    past: Sequence[Past[V] | None],
    context: int,
) -> tuple[V, list[KeysValues[V]]]:
    """`decoder` for the blocks of one part: `past` and the new `KeysValues` are those of its blocks.

    Returns:
        logits [1, T, vocab] of the part with the head, else the stream behind its last block [1, T, hidden].
    """
    new: list[KeysValues[V]] = []
    rotary = rotary_factors(ops, config, positions, context) if held.layers else None
    for layer, before in zip(held.layers, past, strict=True):
        assert rotary is not None
        x, keys_values = block(ops, config, layer, x, rotary, mask, before)
        new.append(keys_values)
    return (head(ops, x) if held.heads else x), new


def rotary_factors(ops: Ops[V], config: ModelConfig, positions: V, context: int) -> Rotary[V]:
    """Rows `positions` of the rope tables, which carry the model's own inverse frequencies."""
    cos, sin = (table.numpy() for table in rope_table(config, context))  # [context, head_dim]
    half = config.head_dim // 2
    signed = np.concatenate([-sin[:, :half], sin[:, half:]], axis=1)
    shape = (1, 1, positions.shape[0], config.head_dim)
    rows = [
        ops.reshape(ops.gather(ops.constant(table, f"{name}.table"), positions, name), shape)
        for name, table in (("rope.cos", cos), ("rope.sin", signed))
    ]
    return Rotary(*rows)


def block(
    ops: Ops[V],
    config: ModelConfig,
    layer: int,
    x: V,
    rotary: Rotary[V],
    mask: V,
    past: Past[V] | None,
) -> tuple[V, KeysValues[V]]:
    """One decoder block: x [1, T, hidden] to its output [1, T, hidden] and the new keys and values.

    Every value that the description names has that name here, behind the layer's: `layers.3.mlp_norm`.
    """
    at, weights = f"layers.{layer}", f"model.layers.{layer}"
    described = block_of(config)
    attend, values, new = described.attention, {STREAM: x}, None
    for step in described.steps:
        inputs, name = [values[value] for value in step.inputs], f"{at}.{step.makes}"
        match step:
            case Norm():
                made = _normed(ops, step, inputs[0], f"{weights}.{step.weight}", name)
            case Linear():
                made = _linear(ops, step, inputs[0], f"{weights}.{step.weight}", name)
            case Attend():
                made, new = attention(ops, step, at, inputs, rotary, mask, past)
            case Silu():
                made = ops.silu(inputs[0], name)
            case Product():
                made = ops.multiply(inputs[0], inputs[1], name)
            case Add():
                made = ops.add(inputs[0], inputs[1], name)
        values[step.makes] = _split_heads(ops, made, attend.size) if step.makes in attend.inputs else made
    assert new is not None
    return values[described.stream[-1]], new


def attention(
    ops: Ops[V],
    step: Attend,
    at: str,
    inputs: Sequence[V],
    rotary: Rotary[V],
    mask: V,
    past: Past[V] | None,
) -> tuple[V, KeysValues[V]]:
    """Grouped-query attention; the query heads of one key head are rows of one matrix: no key is repeated.

    Args:
        inputs: queries [1, heads, T, size], keys and values [1, kv_heads, T, size].

    Returns:
        the heads' mixed values side by side [1, T, heads * size], and the step's own keys and values.
    """
    query, key, values = inputs
    tokens, heads, kv_heads, size = query.shape[2], step.heads, step.kv_heads, step.size
    query = ops.scale(rope(ops, query, rotary, f"{at}.q_rope"), step.scale, f"{at}.q_scaled")
    key = ops.cached(rope(ops, key, rotary, f"{at}.k_rope"), f"{at}.keys")
    keys = ops.transpose(key, (0, 1, 3, 2))  # [1, kv_heads, size, T]
    new = KeysValues(keys, ops.cached(values, f"{at}.values"))
    seen = new if past is None else past.then(ops, new)
    slots, rows = seen.keys.shape[3], heads // kv_heads * tokens
    query = ops.reshape(query, (1, kv_heads, rows, size))
    scores = ops.matmul(query, seen.keys, f"{at}.scores")  # [1, kv_heads, rows, C]
    scores = ops.reshape(scores, (1, heads, tokens, slots))
    shares = ops.masked_softmax(scores, mask, f"{at}.shares")
    shares = ops.reshape(shares, (1, kv_heads, rows, slots))
    mixed = ops.matmul(shares, seen.values, f"{at}.{step.makes}")  # [1, kv_heads, rows, size]
    mixed = ops.transpose(ops.reshape(mixed, (1, heads, tokens, size)), (0, 2, 1, 3))  # [1, T, heads, size]
    return ops.reshape(mixed, (1, tokens, heads * size)), new


def rope(ops: Ops[V], x: V, rotary: Rotary[V], name: str) -> V:
    """x * cos + swap(x) * sin on x [1, heads, T, head_dim]; swap exchanges the halves, the sign is in sin."""
    size = x.shape[3]
    swapped = ops.concat([ops.slice(x, 3, size // 2, size), ops.slice(x, 3, 0, size // 2)], 3)
    straight = ops.multiply(x, rotary.cos, f"{name}.cos")
    return ops.add(straight, ops.multiply(swapped, rotary.sin, f"{name}.sin"), name)


def block_output(layer: int) -> str:
    """Name of the stream behind a block."""
    return f"layers.{layer}.output"


def head(ops: Ops[V], x: V) -> V:
    """Final norm and output projection: [1, T, hidden] -> logits [1, T, vocab]."""
    return ops.linear(ops.rms_norm(x, "model.norm", "final_norm"), "lm_head", "logits")


def _normed(ops: Ops[V], step: Norm, x: V, weight: str, name: str) -> V:
    """RMSNorm of x [1, T, width]: of each token, or of each head of each token."""
    shape = tuple(x.shape)
    if shape[-1] == step.size:
        return ops.rms_norm(x, weight, name)
    heads = ops.reshape(x, (1, shape[1] * (shape[2] // step.size), step.size))  # [1, T * heads, size]
    return ops.reshape(ops.rms_norm(heads, weight, name), shape)


def _linear(ops: Ops[V], step: Linear, x: V, weight: str, name: str) -> V:
    """x [1, T, in] through a linear [1, T, out], with its bias where it has one."""
    if not step.biased:
        return ops.linear(x, weight, name)
    return ops.add(ops.linear(x, weight, f"{name}.product"), ops.vector(f"{weight}.bias"), name)


def _split_heads(ops: Ops[V], x: V, size: int) -> V:
    """[1, T, heads * size] -> [1, heads, T, size]."""
    batch, tokens, width = x.shape
    return ops.transpose(ops.reshape(x, (batch, tokens, width // size, size)), (0, 2, 1, 3))
