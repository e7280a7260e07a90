"""The decoder as a Core AI program of fixed lengths for the Neural Engine, as `export/coreai/static/contract.py` says.

Values are [1, channels, 1, tokens], linears 1x1 convolutions, all numbers float16, heads are attended to one by one,
and a softmax is taken over channels: so Apple's rules for authors want it (github.com/apple/coreai-models 86b363d,
neural_engine_rules.md). Codes and scales are constants; every function that reads a weight reads the same bytes.

    norm(x)  x / m * rsqrt(mean((x / m)²) + (e / m)²) * scale, m = max(e, largest |x|), e = sqrt(eps): no square of a
             float16 number goes beyond float16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from bluelm.block import STREAM, Add, Attend, Linear, Norm, Product, Silu, block_of
from bluelm.rope import rope_table
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.coreai import builder as b
from export.coreai.builder import Type, Written
from export.coreai.dialect import Program, Value, ops
from export.coreai.static import contract as c
from export.coreai.weights import Weight, check_weight, half

ONE = np.array([1, 1], np.uint32)


def build(quantized: QuantizedCheckpoint, context: int, chunk: int) -> Program:
    """The whole program; weights are read once for each function.

    Raises:
        TargetError: the engine does not take such lengths; float16 does not hold a vector or a scale.
    """
    c.check_lengths(quantized.config, context, chunk)
    decoder, program = _Decoder(quantized, context), Written()
    with program.open():
        program.graph(c.LOAD, {}, decoder.table)
        for tokens in c.lengths(chunk):
            program.graph(c.gather(tokens), decoder.gathers(tokens), decoder.gathered)
            program.graph(c.extend(context, tokens), decoder.takes(tokens), decoder.extend, states=(c.KEYS, c.VALUES))
        program.graph(c.prompt(context, chunk), decoder.takes(chunk), decoder.prompt, states=(c.KEYS, c.VALUES))
    return _laid_out(program.finish(), context, chunk)


def _laid_out(program: Program, context: int, chunk: int) -> Program:
    """The program with tables and caches laid out as the chip and its host share them."""
    table = b.layout([c.INTERLEAVE, 1, 1], [1, 1, 1, 1])
    cache = b.layout([1, 1, c.INTERLEAVE, 1, 1], [1, 1, 1, 1, c.INTERLEAVE * context, 1])
    for name in (c.LOAD, *map(c.gather, c.lengths(chunk))):
        program.set_hardware_constraints(name, {c.TABLE: table})
    for name in (*(c.extend(context, tokens) for tokens in c.lengths(chunk)), c.prompt(context, chunk)):
        program.set_hardware_constraints(name, {c.KEYS: cache, c.VALUES: cache})
    return program


@dataclass(frozen=True)
class _Step:
    """What every block of one call shares.

    Attributes:
        count: tokens. start, stop: int32 [1], the slots of the caches that they fill.
        cos, sin: float16 [1, 1, head_dim, T].
    """

    count: int
    start: Value
    stop: Value
    cos: Value
    sin: Value
    mask: Value


class _Decoder:
    """Writes the functions."""

    def __init__(self, quantized: QuantizedCheckpoint, context: int) -> None:
        self._quantized, self._config, self._context = quantized, quantized.config, context
        tables = (table.half().numpy() for table in rope_table(self._config, context))  # [context, head_dim]
        self._tables = dict(zip(("rope.cos", "rope.sin"), tables, strict=True))
        self._rows = c.table_rows(self._config.vocab_size)

    def table(self) -> dict[str, Value]:
        """Codes of the embedding, int8 also where the file has 4 bits of each."""
        table = self._quantized.embed()
        check_weight(table, EMBED)
        codes = table.signed_codes().numpy()
        codes = np.pad(codes, ((0, self._rows - len(codes)), (0, 0)))
        held = b.codes(codes[:, None], table.bits, f"{EMBED}.codes")
        return {c.TABLE: held if table.bits == 8 else ops.cast(held, np.int8)}

    def gathers(self, tokens: int) -> dict[str, Type]:
        """Inputs of `gathered`."""
        table = b.tensor((self._rows, 1, self._config.hidden_size), b.signed(8))
        return {c.TOKENS: b.tensor((1, tokens), b.signed(32)), c.TABLE: table}

    def gathered(self, tokens: Value, table: Value) -> dict[str, Value]:
        """Rows of the table times their scales."""
        at = ops.expand_dims(tokens, [2])
        scales = b.constant(self._quantized.embed().scales.numpy(), f"{EMBED}.scales")  # [vocab, 1]
        picked = ops.cast(ops.gather_nd(table, at), np.float16)  # [1, T, 1, hidden]
        return {c.GATHERED: ops.broadcasting_mul(picked, ops.expand_dims(ops.gather_nd(scales, at), [2]))}

    def takes(self, tokens: int) -> dict[str, Type]:
        """Inputs of `extend` and `prompt`."""
        config, half = self._config, b.half()
        cache = (config.num_layers, 1, config.num_kv_heads * config.head_dim, 1, self._context)
        return {
            c.STREAM: b.tensor((1, tokens, 1, config.hidden_size), half),
            c.POSITIONS: b.tensor((1, tokens), b.unsigned(16)),
            c.STEP: b.tensor((1,), b.signed(32)),
            c.MASK: b.tensor((1, self._context, 1, tokens), half),
            c.KEYS: b.tensor(cache, half),
            c.VALUES: b.tensor(cache, half),
        }

    def extend(self, *inputs: Value) -> dict[str, Value]:
        """Logits of every token."""
        x, keys, values = self._blocks(*inputs, whole=True)
        x = b.transposed(_norm(x, self._scale("model.norm"), self._config.rms_norm_eps, 1), [0, 2, 3, 1])
        head = Weight(self._quantized.linear(HEAD), HEAD).dequantized()  # [vocab, hidden]
        return {c.KEYS: keys, c.VALUES: values, c.LOGITS: ops.broadcasting_batch_matmul(x, b.transposed(head, [1, 0]))}

    def prompt(self, *inputs: Value) -> dict[str, Value]:
        """The caches; of the last block nothing but its keys and values is computed."""
        _, keys, values = self._blocks(*inputs, whole=False)
        first = (b.cut(cache, ops.constant([0] * 5), ops.constant([1] * 5), (1,) * 5) for cache in (keys, values))
        return {c.KEYS: keys, c.VALUES: values, c.LOGITS: ops.broadcasting_add(*first)}

    def _blocks(
        self, x: Value, positions: Value, start: Value, mask: Value, keys: Value, values: Value, *, whole: bool
    ) -> tuple[Value, Value, Value]:
        """The stream behind the last block, and both caches."""
        count = int(x.type.shape[1])
        at = ops.expand_dims(ops.cast(positions, np.int32), [2])
        rows = (ops.gather_nd(b.constant(table, name), at) for name, table in self._tables.items())  # [1, T, size]
        cos, sin = (ops.expand_dims(b.transposed(row, [0, 2, 1]), [1]) for row in rows)
        step = _Step(count, start, ops.broadcasting_add(start, ops.constant([count])), cos, sin, mask)
        x = b.transposed(x, [0, 3, 2, 1])
        for layer in range(self._config.num_layers):
            last = layer == self._config.num_layers - 1
            block = _Layer(self._quantized, layer, step, x, keys, values)
            x = x if last and not whole else block.value(block_of(self._config).stream[-1])
            keys, values = block.caches()
        return x, keys, values

    def _scale(self, name: str) -> Value:
        return scale(self._quantized, name, (1, -1, 1, 1))


class _Layer:
    """One block: each value is written when it is first asked for."""

    def __init__(
        self, quantized: QuantizedCheckpoint, layer: int, step: _Step, x: Value, keys: Value, values: Value
    ) -> None:
        self._quantized, self._config, self._layer, self._step = quantized, quantized.config, layer, step
        self._block, self._made = block_of(self._config), {STREAM: x}
        self._caches = (keys, values)
        self._kept: tuple[Value, Value] | None = None

    def value(self, name: str) -> Value:
        """By its name in the block's description."""
        if name not in self._made:
            self._made[name] = self._write(self._block.makers[name])
        return self._made[name]

    def caches(self) -> tuple[Value, Value]:
        """Keys and values of all layers, with those of this block's tokens."""
        if self._kept is None:
            attend, config, step = self._block.attention, self._config, self._step
            shape = [1, config.num_kv_heads * config.head_dim, 1, step.count]
            key = ops.reshape(_rotated(self.value(attend.keys), step, config.head_dim), shape)
            value = ops.reshape(self.value(attend.values), shape)
            keys, values = (
                _kept(cache, new, self._layer, step) for cache, new in zip(self._caches, (key, value), strict=True)
            )
            self._kept = keys, values
        return self._kept

    def _write(self, one: Norm | Linear | Attend | Silu | Product | Add) -> Value:
        at = f"model.layers.{self._layer}"
        match one:
            case Norm():
                heads = self._block.heads.get(one.makes)
                shape, axis = ((1, -1, 1, 1), 1) if heads is None else ((1, 1, -1, 1), 2)
                gamma = scale(self._quantized, f"{at}.{one.weight}", shape)
                return _norm(self.value(one.reads), gamma, self._config.rms_norm_eps, axis)
            case Linear():
                return self._linear(one, f"{at}.{one.weight}")
            case Attend():
                return self._attend(one)
            case Silu():
                return ops.silu(self.value(one.reads))
            case Product():
                return ops.broadcasting_mul(self.value(one.left), self.value(one.right))
            case Add():
                return ops.broadcasting_add(self.value(one.stream), self.value(one.branch))

    def _linear(self, one: Linear, name: str) -> Value:
        """[1, rows, 1, T]; where its rows are heads, [1, heads, size, T]."""
        weight = Weight(self._quantized.linear(name), name, kernel=True).dequantized()
        made = ops.conv2d(self.value(one.reads), weight, ONE, ONE, np.array(1, np.uint32))
        if one.biased:
            made = ops.broadcasting_add(made, scale(self._quantized, name, (1, -1, 1, 1), "bias"))
        heads = self._block.heads.get(one.makes)
        return made if heads is None else ops.reshape(made, [1, heads, one.rows // heads, self._step.count])

    def _attend(self, one: Attend) -> Value:
        """softmax(scale kᵀ q + mask) of each head, and what its values make of that: [1, heads * size, 1, T]."""
        config, step, group = self._config, self._step, one.heads // one.kv_heads
        query = ops.broadcasting_mul(
            _rotated(self.value(one.queries), step, one.size), ops.constant(np.float16(one.scale))
        )
        query = ops.reshape(query, [1, one.heads * one.size, 1, step.count])
        channels = one.kv_heads * one.size
        keys, values = (_row(cache, self._layer, channels) for cache in self.caches())
        scores: list[Value] = []
        for head in range(one.heads):
            q = b.transposed(_part(query, 1, head, one.size), [0, 2, 3, 1])  # [1, 1, T, size]
            k = b.transposed(_part(keys, 1, head // group, one.size), [0, 2, 1, 3])  # [1, 1, size, C]
            scores.append(b.transposed(ops.broadcasting_batch_matmul(q, k), [0, 3, 1, 2]))  # [1, C, 1, T]
        masked = ops.broadcasting_add(ops.concat(2, scores) if len(scores) > 1 else scores[0], step.mask)
        shares = ops.softmax(masked, 1)  # [1, C, heads, T]
        mixed: list[Value] = []
        for head in range(one.heads):
            share = b.transposed(_part(shares, 2, head, 1), [0, 2, 1, 3])  # [1, 1, C, T]
            v = b.transposed(_part(values, 1, head // group, one.size), [0, 2, 1, 3])  # [1, 1, size, C]
            mixed.append(b.transposed(ops.broadcasting_batch_matmul(v, share), [0, 2, 1, 3]))  # [1, size, 1, T]
        assert config.head_dim == one.size
        return ops.concat(1, mixed) if len(mixed) > 1 else mixed[0]


def scale(quantized: QuantizedCheckpoint, name: str, shape: Sequence[int], kind: str = "weight") -> Value:
    """A vector of float16 along one axis of four."""
    array = half(quantized.vector(f"{name}.{kind}").numpy(), f"{name}.{kind}")
    return b.constant(array.reshape(shape), f"{name}.{kind}")


def _norm(x: Value, gamma: Value, eps: float, axis: int) -> Value:
    """RMSNorm over an axis, as the module's formula says."""
    least = ops.constant(np.float16(sqrt(eps)))
    largest = ops.broadcasting_maximum(ops.reduce_max(ops.abs_(x), [axis]), least)
    y = ops.broadcasting_divide(x, largest)
    small = ops.broadcasting_divide(least, largest)
    power = ops.reduce_mean(ops.broadcasting_mul(y, y), [axis])
    unit = ops.rsqrt(ops.broadcasting_add(power, ops.broadcasting_mul(small, small)))
    return ops.broadcasting_mul(ops.broadcasting_mul(y, unit), gamma)


def _rotated(x: Value, step: _Step, size: int) -> Value:
    """x [1, heads, size, T] turned to its positions: x * cos + (-second half, first half) * sin."""
    first, second = (_part(x, 2, place, size // 2) for place in (0, 1))
    negative = ops.broadcasting_mul(second, ops.constant(np.float16(-1)))
    swapped = ops.concat(2, [negative, first])
    return ops.broadcasting_add(ops.broadcasting_mul(x, step.cos), ops.broadcasting_mul(swapped, step.sin))


def _part(x: Value, axis: int, place: int, size: int) -> Value:
    """The part number `place` of those of `size` along an axis of four."""
    shape = [int(each) for each in x.type.shape]
    start, stop = [0] * 4, list(shape)
    start[axis], stop[axis], shape[axis] = place * size, (place + 1) * size, size
    return b.cut(x, ops.constant(start), ops.constant(stop), shape)


def _kept(cache: Value, new: Value, layer: int, step: _Step) -> Value:
    """The whole cache once `new` [1, channels, 1, T] lies in the step's slots of a layer."""
    channels = int(new.type.shape[1])
    start = ops.concat(0, [ops.constant([layer, 0, 0, 0]), step.start])
    stop = ops.concat(0, [ops.constant([layer + 1, 1, channels, 1]), step.stop])
    return ops.slice_update(cache, start, stop, [1] * 5, ops.expand_dims(new, [0]))


def _row(cache: Value, layer: int, channels: int) -> Value:
    """All slots of a layer, [1, channels, 1, C]."""
    slots = int(cache.type.shape[4])
    start, stop = ops.constant([layer, 0, 0, 0, 0]), ops.constant([layer + 1, 1, channels, 1, slots])
    return ops.shrink_dims(b.cut(cache, start, stop, (1, 1, channels, 1, slots)), [0])
