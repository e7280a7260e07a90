"""`Ops` that writes a Core ML program by coremltools' MIL builder; weights are named here, written later.

Symbols are MIL variables. Two things differ from the ONNX backends. The KV cache is a state of the program:
`concat` of a `Slots` and new keys or values writes them at the step's position and gives the whole cache.
RMSNorm is the LayerNorm of [x, -x], whose mean is zero and whose variance is mean(x**2): one op that Core ML
computes without overflow in float16, where x**2 beyond 65504 would be infinite.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from compress.checkpoint.quantized import QuantizedTensor
from export.coreml.importing import import_coremltools

Activations = Literal["float16", "float32"]
MASKED = -1e4  # far below any score, and far inside float16
Provider = Callable[[], np.ndarray]


class Quantized(Protocol):
    """What is asked of a quantized checkpoint here."""

    @property
    def config(self) -> ModelConfig: ...
    def linear(self, name: str) -> QuantizedTensor: ...
    def embed(self) -> QuantizedTensor: ...
    def vector(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class WeightForm:
    """How a quantized weight is stored: all that the program needs before the weight itself is read."""

    shape: tuple[int, int]
    groups: int
    bits: int
    symmetric: bool

    @property
    def nbytes(self) -> int:
        """Bytes of codes, float16 scales and, unless symmetric, zero points."""
        rows, columns = self.shape
        zeros = 0 if self.symmetric else rows * self.groups * self.bits // 8
        return rows * columns * self.bits // 8 + rows * self.groups * 2 + zeros


@dataclass
class Constants:
    """Constants of a program by id: read when the package is written, one at a time, for all functions."""

    quantized: Quantized
    activations: Activations
    providers: dict[str, Provider] = field(default_factory=dict)
    layouts: dict[str, WeightForm] = field(default_factory=dict)
    _last: dict[str, QuantizedTensor] = field(default_factory=dict)

    def tensor(self, name: str) -> QuantizedTensor:
        """A quantized weight; `embed` is the token table. The last one is kept: codes, then its scales."""
        if name not in self._last:
            self._last.clear()  # before the next is read: never two at a time
            self._last[name] = self.quantized.embed() if name == "embed" else self.quantized.linear(name)
            if self.activations == "float16" and self._last[name].scales.dtype != torch.float16:
                fix = "quantize the float checkpoint here, whose scales are exact in float16"
                raise TargetError("the package's scales are float16, and these have more digits", where=name, fix=fix)
        return self._last[name]

    def layout(self, name: str) -> WeightForm:
        """Layout of a quantized weight; reads it the first time."""
        if name not in self.layouts:
            q = self.tensor(name)
            self.layouts[name] = WeightForm(q.shape, q.groups, q.bits, q.symmetric)
        return self.layouts[name]

    def forget(self) -> None:
        """Let go of the tensor that was read last, and of the program's constants."""
        self._last.clear()
        self.providers.clear()


@dataclass(frozen=True)
class Slots:
    """The cache of one layer's keys or values as an operand of `concat`: a state and its shape."""

    state: Any
    shape: tuple[int, ...]


def signed_codes(tensor: QuantizedTensor) -> np.ndarray:
    """int8 [out, in]: codes - 2**(bits - 1), with one copy; a table of a 7B has 410 million codes."""
    codes = tensor.codes.numpy()
    return (codes ^ 128).view(np.int8) if tensor.bits == 8 else codes.view(np.int8) - np.int8(8)


def identifier(name: str) -> str:
    """A value name as MIL allows it: `layers.0.output` is `layers_0_output`."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


@contextmanager
def fresh_names() -> Iterator[None]:
    """The builder numbers unnamed constants over the whole process; here they count from zero."""
    import_coremltools()
    from coremltools.converters.mil.mil import Builder

    kept = Builder.name_count
    Builder.name_count = defaultdict(int)
    try:
        yield
    finally:
        Builder.name_count = kept


class MilOps:
    """Emits one function. Use inside an open MIL `Function` and `fresh_names()`.

    Args:
        weights: gets a provider for each constant.
        position: MIL variable, int32 [1]: slot of the step's first token.
        tokens: T of this function.
    """

    def __init__(self, weights: Constants, epsilon: float, position: Any, tokens: int) -> None:
        from coremltools.converters.mil.mil import Builder

        self._mb: Any = Builder
        self._weights, self._epsilon = weights, epsilon
        self._position, self._tokens = position, tokens
        self._moved: dict[str, int] = defaultdict(int)
        self._bounds: dict[tuple[int, int], tuple[Any, Any]] = {}
        self.dtype = np.float16 if weights.activations == "float16" else np.float32
        self.type_name = "fp16" if weights.activations == "float16" else "fp32"

    # constants

    def _stored(self, key: str, dtype: Any, shape: Sequence[int], provider: Provider) -> Any:
        """A constant whose bytes `provider` gives later; the builder sees zeros that take no memory."""
        zeros = np.broadcast_to(np.zeros((), dtype), tuple(shape))
        variable = self._mb.const(val=zeros, name=identifier(key))
        variable.op.weight_id = key
        self._weights.providers[key] = provider
        return variable

    def constant(self, array: np.ndarray, name: str) -> Any:
        """A table baked into the program, in the activations' type."""
        return self._stored(name, self.dtype, array.shape, lambda: np.asarray(array, self.dtype))

    def vector(self, name: str) -> Any:
        rows = self._weights.layout(name.removesuffix(".bias")).shape[0]
        return self._stored(name, self.dtype, (rows,), lambda: self._vector(name))

    def weight(self, name: str) -> Any:
        """The quantized tensor `name` as constexpr_blockwise_shift_scale.

        scale * (code - zero), or scale * code with signed codes where the zero is the middle. Scales are the
        checkpoint's float16 values, in a float32 program as float32: the same numbers.
        """
        from coremltools.converters.mil.mil.types import type_int

        layout, tensor = self._weights.layout(name), self._weights.tensor
        blocks = (layout.shape[0], layout.groups)
        signed = "int" if layout.symmetric else "uint"
        four_bits = type_int.np_int4_dtype if layout.symmetric else type_int.np_uint4_dtype
        storage = four_bits if layout.bits == 4 else np.dtype(f"{signed}8")

        def codes() -> np.ndarray:
            q = tensor(name)
            return (signed_codes(q) if layout.symmetric else q.codes.numpy()).astype(storage, copy=False)

        parameters = {
            "data": self._stored(f"{name}.codes", storage, layout.shape, codes),
            "scale": self._stored(
                f"{name}.scales", self.dtype, blocks, lambda: tensor(name).scales.numpy().astype(self.dtype)
            ),
        }
        if not layout.symmetric:
            parameters["offset"] = self._stored(
                f"{name}.zeros", storage, blocks, lambda: tensor(name).zeros.numpy().astype(storage)
            )
        return self._mb.constexpr_blockwise_shift_scale(**parameters, name=identifier(name))

    def rows(self, name: str, indices: Any, result: str) -> Any:
        """Rows of a quantized table [n, d] with one scale a row: indices [1, T] -> [1, T, d].

        8-bit codes and their scales are gathered apart and multiplied then, so that the table is never
        decompressed whole; 4-bit codes cannot be gathered, and go through the constexpr.

            codes --gather--> int8 [1, T, d] --cast--> mul <--gather-- scales [n, 1]
        """
        mb, at, layout = self._mb, identifier(result), self._weights.layout(name)
        if layout.bits != 8 or not layout.symmetric or layout.groups != 1:
            return self.gather(self.weight(name), indices, result)
        codes = self._stored(
            f"{name}.codes",
            np.dtype("int8"),
            layout.shape,
            lambda: signed_codes(self._weights.tensor(name)),
        )
        scales = self._stored(
            f"{name}.scales",
            self.dtype,
            (layout.shape[0], 1),
            lambda: self._weights.tensor(name).scales.numpy().astype(self.dtype),
        )
        picked = mb.gather(x=codes, indices=indices, axis=0, name=f"{at}_codes")
        picked = mb.cast(x=picked, dtype=self.type_name, name=f"{at}_wide")
        return mb.mul(x=picked, y=mb.gather(x=scales, indices=indices, axis=0, name=f"{at}_scales"), name=at)

    # operations of the lowered decoder

    def linear(self, x: Any, weight: str, name: str) -> Any:
        return self._mb.linear(x=x, weight=self.weight(weight), name=identifier(name))

    def _vector(self, name: str) -> np.ndarray:
        return self._weights.quantized.vector(name).numpy().astype(self.dtype)

    def rms_norm(self, x: Any, weight: str, name: str) -> Any:
        mb, at, hidden = self._mb, identifier(name), x.shape[-1]

        def doubled() -> np.ndarray:
            return np.tile(self._vector(weight), 2)

        negative = mb.mul(x=x, y=self.dtype(-1), name=f"{at}_negative")
        both = mb.concat(values=[x, negative], axis=-1, name=f"{at}_both")  # [1, T, 2 * hidden]
        gamma = self._stored(f"{weight}.doubled", self.dtype, (2 * hidden,), doubled)
        normed = mb.layer_norm(
            x=both, axes=[-1], gamma=gamma, epsilon=self.dtype(self._epsilon), name=f"{at}_layer_norm"
        )
        return mb.slice_by_size(x=normed, begin=[0, 0, 0], size=[1, x.shape[1], hidden], name=at)

    def gather(self, table: Any, rows: Any, name: str) -> Any:
        return self._mb.gather(x=table, indices=rows, axis=0, name=identifier(name))

    def add(self, a: Any, b: Any, name: str) -> Any:
        return self._mb.add(x=a, y=b, name=identifier(name))

    def multiply(self, a: Any, b: Any, name: str) -> Any:
        return self._mb.mul(x=a, y=b, name=identifier(name))

    def scale(self, x: Any, factor: float, name: str) -> Any:
        return self._mb.mul(x=x, y=self.dtype(factor), name=identifier(name))

    def matmul(self, a: Any, b: Any, name: str) -> Any:
        return self._mb.matmul(x=a, y=b, name=identifier(name))

    def masked_softmax(self, scores: Any, mask: Any, name: str) -> Any:
        masked = self._mb.add(x=scores, y=mask, name=identifier(f"{name}.masked"))
        return self._mb.softmax(x=masked, axis=-1, name=identifier(name))

    def silu(self, x: Any, name: str) -> Any:
        return self._mb.silu(x=x, name=identifier(name))

    def cached(self, x: Any, name: str) -> Any:
        return x  # a state holds float16, and `concat` writes it

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        return self._mb.reshape(x=x, shape=list(shape), name=self._move(x, "reshape"))

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        return self._mb.transpose(x=x, perm=list(axes), name=self._move(x, "transpose"))

    def slice(self, x: Any, axis: int, start: int, stop: int) -> Any:
        begin, size = [0] * len(x.shape), list(x.shape)
        begin[axis], size[axis] = start, stop - start
        return self._mb.slice_by_size(x=x, begin=begin, size=size, name=self._move(x, "slice"))

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        if isinstance(parts[0], Slots):
            return self._written(parts[0], parts[1], axis)
        return self._mb.concat(values=list(parts), axis=axis, name=self._move(parts[-1], "concat"))

    # states

    def _written(self, cache: Slots, new: Any, axis: int) -> Any:
        """The whole cache, after the program wrote `new` [.., T, ..] at the slots from `position` on."""
        mb, at = self._mb, identifier(f"{cache.state.name}.after")
        begin, end = self._slot_bounds(len(cache.shape), axis)
        free = [i != axis for i in range(len(cache.shape))]
        if self.dtype is not np.float16:  # states are float16
            new = mb.cast(x=new, dtype="fp16", name=f"{at}_new")
        updated = mb.slice_update(
            x=mb.read_state(input=cache.state, name=f"{at}_before"),
            update=new,
            begin=begin,
            end=end,
            begin_mask=free,
            end_mask=free,
            name=f"{at}_update",
        )
        whole = mb.coreml_update_state(state=cache.state, value=updated, name=at)
        return whole if self.dtype is np.float16 else mb.cast(x=whole, dtype="fp32", name=f"{at}_wide")

    def _slot_bounds(self, rank: int, axis: int) -> tuple[Any, Any]:
        """begin and end of the written slots, int32 [rank] each, zero but at `axis`; made once a function."""
        if (rank, axis) not in self._bounds:
            mb, at = self._mb, f"slots_{axis}"
            stop = mb.add(x=self._position, y=np.array([self._tokens], np.int32), name=f"{at}_stop")
            before, behind = np.zeros(axis, np.int32), np.zeros(rank - axis - 1, np.int32)
            around = lambda v: [p for p in (before, v, behind) if p.shape[0] > 0]  # noqa: E731
            self._bounds[rank, axis] = (
                mb.concat(values=around(self._position), axis=0, name=f"{at}_begin"),
                mb.concat(values=around(stop), axis=0, name=f"{at}_end"),
            )
        return self._bounds[rank, axis]

    def _move(self, x: Any, kind: str) -> str:
        """A name for an op that only moves data: that of its source, and how many came before."""
        self._moved[x.name] += 1
        return f"{x.name}_{kind}{self._moved[x.name]}"
