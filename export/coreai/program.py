"""The decoder as a Core AI program with one function, for lengths of any kind:

    main(input_ids int32 [1, T], position_ids int32 [1, S]; keyCache, valueCache) -> logits float16 [1, T, vocab]

T new tokens continue the S - T that the states hold, [layers, 1, kv_heads, slots, head_dim] float16 each, of as many
slots as who calls it has room for. Names, order and forms are those that Apple's `CoreAILanguageModel` goes by
(github.com/apple/coreai-models). Codes and scales are constants; norms and attention are composites, which Apple's
compiler has kernels for, and whose bodies its CPU runtime computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bluelm.block import STREAM, Add, Attend, Block, Linear, Norm, Product, Silu, block_of
from bluelm.rope import rope_table
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.coreai import builder as b
from export.coreai.builder import FREE, TO_THE_END, Composite, Written
from export.coreai.dialect import Program, Value, ops
from export.coreai.weights import Weight, half

MAIN = "main"
TOKENS, POSITIONS, KEYS, VALUES, LOGITS = "input_ids", "position_ids", "keyCache", "valueCache", "logits"
HIDDEN_SCORE = -1e4
"""Added to the score of a token that is not seen, as Apple's composite does."""


def build(quantized: QuantizedCheckpoint, context: int) -> Program:
    """The whole program; weights are read one by one.

    Args:
        context: rows of the rope tables, so the longest sequence.

    Raises:
        TargetError: float16 does not hold a vector or a scale.
    """
    config, program = quantized.config, Written()
    cache = (config.num_layers, 1, config.num_kv_heads, FREE, config.head_dim)
    with program.open():
        inputs = {name: b.tensor((1, FREE), b.signed(32)) for name in (TOKENS, POSITIONS)}
        inputs |= {name: b.tensor(cache, b.half()) for name in (KEYS, VALUES)}
        decoder = _Decoder(quantized, context, program)
        program.graph(MAIN, inputs, decoder.main, states=(KEYS, VALUES))
    return program.finish()


@dataclass(frozen=True)
class _Step:
    """What every block of one call shares: T, S - T and S as int32 [1]; cosines and sines float16 [1, T, head_dim]."""

    count: Value
    offset: Value
    length: Value
    cos: Value
    sin: Value


class _Decoder:
    """Writes `main`; composites are graphs before it, one for each form of their inputs."""

    def __init__(self, quantized: QuantizedCheckpoint, context: int, program: Written) -> None:
        self._quantized, self._config = quantized, quantized.config
        tables = (table.half().numpy() for table in rope_table(self._config, context))  # [context, head_dim]
        self._tables = dict(zip(("rope.cos", "rope.sin"), tables, strict=True))
        described = block_of(self._config)
        shapes = {norm.weight: _normed(norm, described) for norm in described.norms.values()}
        forms = dict.fromkeys([*shapes.values(), (1, FREE, self._config.hidden_size)])
        self._norms = {shape: _norm_graph(program, shape, self._config.rms_norm_eps) for shape in forms}
        self._attention = _attention_graph(program, described.attention)

    def main(self, tokens: Value, positions: Value, keys: Value, values: Value) -> dict[str, Value]:
        count, length = _length(tokens), _length(positions)
        offset = ops.broadcasting_sub(length, count)
        zero, end = ops.constant([0]), ops.constant([TO_THE_END])
        new = b.cut(positions, ops.concat(0, [zero, offset]), ops.concat(0, [end, length]), (1, FREE))
        rows = ops.expand_dims(new, [2])
        cos, sin = (ops.gather_nd(b.constant(table, name), rows) for name, table in self._tables.items())
        step = _Step(count, offset, length, cos, sin)
        x = self._embedded(tokens)
        for layer in range(self._config.num_layers):
            x, keys, values = self._block(layer, x, step, keys, values)
        x = self._norm(x, "model.norm.weight")
        return {KEYS: keys, VALUES: values, LOGITS: self._linear(x, HEAD)}

    def _embedded(self, tokens: Value) -> Value:
        """Rows of the table, [1, T, hidden]: codes and scales are gathered, then multiplied."""
        table, at = self._quantized.embed(), ops.expand_dims(tokens, [2])
        parts = Weight(table, EMBED)
        picked = ops.cast(ops.gather_nd(parts.codes, at), np.float16)
        return ops.broadcasting_mul(picked, ops.gather_nd(parts.scales, at))

    def _block(self, layer: int, x: Value, step: _Step, keys: Value, values: Value) -> tuple[Value, Value, Value]:
        """The stream behind a block, and both caches with what it has put into them."""
        at, described = f"model.layers.{layer}", block_of(self._config)
        made = {STREAM: x}
        for one in described.steps:
            inputs = [made[name] for name in one.inputs]
            match one:
                case Norm():
                    value = self._norm(inputs[0], f"{at}.{one.weight}.weight")
                case Linear():
                    value = self._linear(inputs[0], f"{at}.{one.weight}", one.biased)
                    heads = described.heads.get(one.makes)
                    if heads is not None:
                        value = ops.reshape(value, [1, FREE, heads, one.rows // heads])
                        value = b.transposed(value, [0, 2, 1, 3])
                case Attend():
                    value, keys, values = self._attend(one, layer, inputs, step, keys, values)
                case Silu():
                    value = ops.silu(inputs[0])
                case Product():
                    value = ops.broadcasting_mul(inputs[0], inputs[1])
                case Add():
                    value = ops.broadcasting_add(inputs[0], inputs[1])
            made[one.makes] = value
        return made[described.stream[-1]], keys, values

    def _attend(
        self, one: Attend, layer: int, inputs: Sequence[Value], step: _Step, keys: Value, values: Value
    ) -> tuple[Value, Value, Value]:
        query, key = (_rotated(x, step, one.size) for x in inputs[:2])
        key, keys = _kept(keys, key, layer, step)
        value, values = _kept(values, inputs[2], layer, step)
        mixed = b.transposed(self._attention(query, key, value), [0, 2, 1, 3])  # [1, T, heads, size]
        return ops.reshape(mixed, [1, FREE, one.heads * one.size]), keys, values

    def _norm(self, x: Value, weight: str) -> Value:
        gamma = half(self._quantized.vector(weight).numpy(), weight)
        shape = tuple(FREE if size < 0 else size for size in x.type.shape)
        return self._norms[shape](x, b.constant(gamma, weight))

    def _linear(self, x: Value, name: str, biased: bool = False) -> Value:
        parts = Weight(self._quantized.linear(name), name)
        made = ops.broadcasting_batch_matmul(x, b.transposed(parts.dequantized(), [1, 0]))
        if not biased:
            return made
        bias = half(self._quantized.vector(f"{name}.bias").numpy(), f"{name}.bias")
        return ops.broadcasting_add(made, b.constant(bias, f"{name}.bias"))


def _length(value: Value, axis: int = 1) -> Value:
    """How long a value is along an axis, int32 [1]."""
    return ops.slice_(ops.cast(ops.get_shape(value), np.int32), [axis], [axis + 1], [1])


def _rotated(x: Value, step: _Step, size: int) -> Value:
    """x [1, heads, T, size] turned to its positions: x * cos + (-second half, first half) * sin."""
    first = ops.slice_(x, [0, 0, 0, 0], [TO_THE_END] * 3 + [size // 2], [1] * 4)
    second = ops.slice_(x, [0, 0, 0, size // 2], [TO_THE_END] * 4, [1] * 4)
    negative = ops.broadcasting_mul(second, ops.constant(np.float16(-1)))
    swapped = ops.concat(3, [negative, first])
    return ops.broadcasting_add(ops.broadcasting_mul(x, step.cos), ops.broadcasting_mul(swapped, step.sin))


def _kept(cache: Value, new: Value, layer: int, step: _Step) -> tuple[Value, Value]:
    """The first S slots of a layer [1, kv_heads, S, size] once `new` [1, kv_heads, T, size] lies behind the others,
    and the whole cache."""
    here, behind = ops.constant([layer, 0, 0]), ops.constant([layer + 1, TO_THE_END, TO_THE_END])
    zero, end = ops.constant([0]), ops.constant([TO_THE_END])
    stop = ops.concat(0, [behind, step.length, end])
    cache = ops.slice_update(cache, ops.concat(0, [here, step.offset, zero]), stop, [1] * 5, ops.expand_dims(new, [0]))
    held = b.cut(cache, ops.constant([layer, 0, 0, 0, 0]), stop, (1, *new.type.shape))
    return ops.shrink_dims(held, [0]), cache


def _normed(norm: Norm, described: Block) -> tuple[int, ...]:
    """The form of what a norm reads: whole tokens, or their heads."""
    heads = described.heads.get(norm.makes)
    return (1, FREE, norm.size) if heads is None else (1, heads, FREE, norm.size)


def _norm_graph(program: Written, shape: tuple[int, ...], eps: float) -> Callable[..., Value]:
    """x / sqrt(mean(x**2) + eps) * scale over the last axis; squares in float32."""
    axis = len(shape) - 1

    def body(x: Value, scale: Value) -> dict[str, Value]:
        wide = ops.cast(x, np.float32)
        power = ops.reduce_mean(ops.broadcasting_mul(wide, wide), [axis])
        unit = ops.rsqrt(ops.broadcasting_add(power, ops.constant(np.float32(eps))))
        return {"output": ops.broadcasting_mul(ops.cast(ops.broadcasting_mul(wide, unit), np.float16), scale)}

    inputs = {"input": b.tensor(shape, b.half()), "scale": b.tensor((shape[-1],), b.half())}
    told = Composite("rms_norm", ("input", "scale"), {"axes": -1, "eps": float(eps), "version": 1})
    name = "_".join(["rms_norm", *(str(size) for size in shape[1:] if size != FREE)])
    return program.graph(name, inputs, body, composite=told)


def _attention_graph(program: Written, one: Attend) -> Callable[..., Value]:
    """softmax(scale q kᵀ + mask) v in float32; the last query sees every key, each one before it one less."""
    shared = one.heads != one.kv_heads

    def body(query: Value, key: Value, value: Value) -> dict[str, Value]:
        count, length = (_length(x, 2) for x in (query, key))
        query, key, value = (ops.cast(x, np.float32) for x in (query, key, value))
        query = ops.broadcasting_mul(query, ops.constant(np.float32(one.scale)))
        if shared:  # the queries of one key head lie below each other
            query = ops.reshape(query, [1, one.kv_heads, FREE, one.size])
        scores = ops.broadcasting_batch_matmul(query, b.transposed(key, [0, 1, 3, 2]))
        if shared:
            scores = ops.reshape(scores, ops.concat(0, [ops.constant([1, one.heads]), count, length]))
        stop = ops.reshape(length, np.zeros(0, np.int32))
        start = ops.reshape(ops.broadcasting_sub(length, count), np.zeros(0, np.int32))
        rows = ops.expand_dims(ops.range_(start, stop, ops.constant(1)), [1])  # [T, 1]
        columns = ops.expand_dims(ops.range_(ops.constant(0), stop, ops.constant(1)), [0])  # [1, S]
        hidden = ops.cast(ops.broadcasting_greater(columns, rows), np.float32)
        scores = ops.broadcasting_add(scores, ops.broadcasting_mul(hidden, ops.constant(np.float32(HIDDEN_SCORE))))
        shares = ops.softmax(scores, 3)
        if shared:
            shares = ops.reshape(shares, ops.concat(0, [ops.constant([1, one.kv_heads, FREE]), length]))
        mixed = ops.broadcasting_batch_matmul(shares, value)
        mixed = ops.reshape(mixed, [1, one.heads, FREE, one.size]) if shared else mixed
        return {"output": ops.cast(mixed, np.float16)}

    names = ("query", "key", "value")
    inputs = {
        name: b.tensor((1, heads, FREE, one.size), b.half())
        for name, heads in zip(names, (one.heads, one.kv_heads, one.kv_heads), strict=True)
    }
    told = {"scale": float(one.scale), "is_causal": True, "window_size": 0, "version": 1}
    composite = Composite("scaled_dot_product_attention", names, told)
    return program.graph("attention", inputs, body, composite=composite)
