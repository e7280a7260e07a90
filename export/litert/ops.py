"""The lowered decoder as LiteRT operators: every one of them is in XNNPACK's reach, so the whole graph
is delegated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated
from torch import Tensor

from compress.checkpoint.quantized import QuantizedTensor
from export.litert.file import Subgraph, Type
from export.lowering.encoding import Encoding

schema: Any = schema_py_generated  # generated classes, whose annotations are wrong
Op = schema.BuiltinOperator


@dataclass(frozen=True)
class Symbol:
    """A tensor of the graph and its static shape."""

    index: int
    shape: tuple[int, ...]


class LitertOps:
    """Emits into one subgraph. Weights stay integers; `FULLY_CONNECTED` rounds its input to 8 bits a
    token."""

    def __init__(
        self,
        graph: Subgraph,
        linear: Callable[[str], QuantizedTensor],
        vector: Callable[[str], Tensor],
        epsilon: float,
        cache_type: int,
        cache_encoding: Callable[[str], Encoding] | None = None,
    ) -> None:
        self.graph, self._linear, self._vector = graph, linear, vector
        self._epsilon, self._cache_type, self._cache_encoding = epsilon, cache_type, cache_encoding

    # -- borders
    def input(self, name: str, shape: Sequence[int], dtype: int = Type.FLOAT32) -> Symbol:
        return Symbol(self.graph.tensor(name, shape, dtype), tuple(shape))

    def cache_input(self, name: str, shape: Sequence[int], value: str) -> Symbol:
        """The cached slots of `value` (`layers.N.keys`), as the step before gave them out."""
        return Symbol(self._cache_tensor(name, shape, value), tuple(shape))

    def _cache_tensor(self, name: str, shape: Sequence[int], value: str) -> int:
        if self._cache_type != Type.INT8:
            return self.graph.tensor(name, shape, self._cache_type)
        assert self._cache_encoding is not None
        codes = schema.QuantizationParametersT()
        codes.scale = np.array([self._cache_encoding(value).scale], np.float32)
        codes.zeroPoint = np.zeros(1, np.int64)
        return self.graph.tensor(name, shape, Type.INT8, quantization=codes)

    def read_cache(self, cache: Symbol, name: str) -> Symbol:
        """Cached numbers as float32."""
        if self._cache_type == Type.FLOAT32:
            return cache
        return self._emit(Op.DEQUANTIZE, [cache.index], name, cache.shape, schema.DequantizeOptionsT(), version=3)

    def write_cache(self, x: Symbol, name: str, value: str) -> Symbol:
        """float32 keys or values (`value`) as the cache's type, for an output."""
        if self._cache_type == Type.FLOAT32:
            return x
        index = self._cache_tensor(name, x.shape, value)
        if self._cache_type == Type.INT8:
            self.graph.operator(Op.QUANTIZE, [x.index], [index], schema.QuantizeOptionsT())
            return Symbol(index, x.shape)
        options = schema.CastOptionsT()
        options.inDataType, options.outDataType = Type.FLOAT32, self._cache_type
        self.graph.operator(Op.CAST, [x.index], [index], options, version=4)
        return Symbol(index, x.shape)

    def cached(self, x: Symbol, name: str) -> Symbol:
        """x as the KV cache will hold it: rounded to the cache's type and back."""
        if self._cache_type == Type.FLOAT32:
            return x
        return self.read_cache(self.write_cache(x, f"{name}.stored", name), name)

    # -- Ops
    def constant(self, array: np.ndarray, name: str) -> Symbol:
        return Symbol(self.graph.constant(name, array.astype(np.float32)), array.shape)

    def vector(self, name: str) -> Symbol:
        return self.constant(self._vector(name).numpy(), name)

    def linear(self, x: Symbol, weight: str, name: str) -> Symbol:
        options = schema.FullyConnectedOptionsT()
        options.keepNumDims, options.asymmetricQuantizeInputs = True, True
        index = self.graph.weight(weight, lambda: self._linear(weight))
        rows = self.graph.table.tensors[index].shape[0]
        return self._emit(Op.FULLY_CONNECTED, [x.index, index, -1], name, (*x.shape[:-1], rows), options, version=13)

    def rms_norm(self, x: Symbol, weight: str, name: str) -> Symbol:
        options = schema.ReducerOptionsT()
        options.keepDims = True
        axis = self.graph.constant("axis.last", np.array([len(x.shape) - 1], np.int32))
        squares = self.multiply(x, x, f"{name}.squares")
        mean = self._emit(Op.MEAN, [squares.index, axis], f"{name}.mean", (*x.shape[:-1], 1), options, version=2)
        epsilon = self.constant(np.array([self._epsilon]), "epsilon")
        spread = self._emit(Op.RSQRT, [self.add(mean, epsilon, f"{name}.sum").index], f"{name}.spread", mean.shape)
        return self.multiply(self.multiply(x, spread, f"{name}.unit"), self.vector(weight), name)

    def gather(self, table: Symbol, rows: Symbol, name: str) -> Symbol:
        options = schema.GatherOptionsT()
        options.axis = 0
        shape = (*rows.shape, *table.shape[1:])
        return self._emit(Op.GATHER, [table.index, rows.index], name, shape, options, version=2)

    def lookup(self, weight: str, rows: Symbol, name: str) -> Symbol:
        """Rows int32 [T] of a quantized table with a scale a row, as float32 [T, columns]."""
        index = self.graph.weight(weight, lambda: self._linear(weight))
        shape = (*rows.shape, self.graph.table.tensors[index].shape[1])
        return self._emit(Op.EMBEDDING_LOOKUP, [rows.index, index], name, shape, version=4)

    def write_slice(self, whole: Symbol, part: Symbol, start: Symbol, name: str) -> Symbol:
        """`whole` with `part` in it from `start` on, int32 [rank]."""
        return self._emit(Op.DYNAMIC_UPDATE_SLICE, [whole.index, part.index, start.index], name, whole.shape)

    def place(self, number: Symbol, rank: int, axis: int, name: str) -> Symbol:
        """int32 [rank], zero but for `number`, int32 [1], at `axis`."""
        unit = self._integers([int(i == axis) for i in range(rank)])
        index = self.graph.tensor(name, (rank,), Type.INT32)
        self.graph.operator(Op.MUL, [number.index, unit], [index], schema.MulOptionsT())
        return Symbol(index, (rank,))

    def add(self, a: Symbol, b: Symbol, name: str) -> Symbol:
        return self._emit(Op.ADD, [a.index, b.index], name, _broadcast(a, b), schema.AddOptionsT())

    def multiply(self, a: Symbol, b: Symbol, name: str) -> Symbol:
        return self._emit(Op.MUL, [a.index, b.index], name, _broadcast(a, b), schema.MulOptionsT())

    def scale(self, x: Symbol, factor: float, name: str) -> Symbol:
        return self.multiply(x, self.constant(np.array([factor]), f"{name}.factor"), name)

    def matmul(self, a: Symbol, b: Symbol, name: str) -> Symbol:
        shape = (*a.shape[:-1], b.shape[-1])
        return self._emit(Op.BATCH_MATMUL, [a.index, b.index], name, shape, schema.BatchMatMulOptionsT())

    def masked_softmax(self, scores: Symbol, mask: Symbol, name: str) -> Symbol:
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        masked = self.add(scores, mask, f"{name}.masked")
        return self._emit(Op.SOFTMAX, [masked.index], name, scores.shape, options)

    def silu(self, x: Symbol, name: str) -> Symbol:
        gate = self._emit(Op.LOGISTIC, [x.index], f"{name}.gate", x.shape)
        return self.multiply(x, gate, name)

    def reshape(self, x: Symbol, shape: Sequence[int]) -> Symbol:
        options = schema.ReshapeOptionsT()
        options.newShape = list(shape)
        target = self._integers(shape)
        return self._emit(Op.RESHAPE, [x.index, target], self._moved(x, "reshape"), tuple(shape), options)

    def transpose(self, x: Symbol, axes: Sequence[int]) -> Symbol:
        shape = tuple(x.shape[axis] for axis in axes)
        order = self._integers(axes)
        return self._emit(
            Op.TRANSPOSE, [x.index, order], self._moved(x, "transpose"), shape, schema.TransposeOptionsT()
        )

    def slice(self, x: Symbol, axis: int, start: int, stop: int) -> Symbol:
        begin = [start if i == axis else 0 for i in range(len(x.shape))]
        shape = tuple(stop - start if i == axis else size for i, size in enumerate(x.shape))
        inputs = [x.index, self._integers(begin), self._integers(shape)]
        return self._emit(Op.SLICE, inputs, self._moved(x, "slice"), shape, schema.SliceOptionsT())

    def concat(self, parts: Sequence[Symbol], axis: int) -> Symbol:
        options = schema.ConcatenationOptionsT()
        options.axis = axis
        total = sum(part.shape[axis] for part in parts)
        shape = tuple(total if i == axis else size for i, size in enumerate(parts[0].shape))
        return self._emit(
            Op.CONCATENATION, [part.index for part in parts], self._moved(parts[-1], "concat"), shape, options
        )

    # -- helpers
    def _emit(
        self,
        operator: int,
        inputs: Sequence[int],
        name: str,
        shape: Sequence[int],
        options: object = None,
        version: int = 1,
    ) -> Symbol:
        moves = operator in (Op.RESHAPE, Op.SLICE)  # of integers, too
        dtype = self.graph.table.tensors[inputs[0]].type if moves else Type.FLOAT32
        index = self.graph.tensor(name, shape, dtype)
        self.graph.operator(operator, inputs, [index], options, version)
        return Symbol(index, tuple(shape))

    def _integers(self, values: Sequence[int]) -> int:
        return self.graph.constant("integers." + "x".join(map(str, values)), np.array(values, np.int32))

    def _moved(self, x: Symbol, kind: str) -> str:
        return f"{self.graph.table.tensors[x.index].name}/{kind}{len(self.graph.table.operators)}"


def _broadcast(a: Symbol, b: Symbol) -> tuple[int, ...]:
    return tuple(int(size) for size in np.broadcast_shapes(a.shape, b.shape))
