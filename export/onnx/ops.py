"""What both ONNX backends of the lowered decoder share: symbols, and operations without weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.lowering.encoding import Encoding
from export.onnx.graph import OnnxGraph


@dataclass(frozen=True)
class Symbol:
    """A tensor of the graph: its name, static shape and, in a quantized graph, how its codes are read."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding | None = None


class OnnxOps(ABC):
    """`Ops` that emits nodes. A backend adds weights, constants, norms and the border of the graph."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._moves: dict[str, int] = {}

    def parameters(self, encoding: Encoding) -> list[str]:
        """Initializers of scale and zero point, shared by all values of one encoding."""
        scale, zero = np.array(encoding.scale, np.float32), np.array(encoding.zero, encoding.dtype)
        return [
            self.graph.initializer(f"scale.{scale.view(np.uint32).item():08x}", scale),
            self.graph.initializer(f"zero.{encoding.dtype}.{encoding.zero}", zero),
        ]

    @abstractmethod
    def emit(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        shape: Sequence[int],
        encoding: Encoding | None = None,
        **attributes: Any,
    ) -> Symbol:
        """One node whose outcome is `name`; `encoding` where it is not the one of `name`'s range."""

    @abstractmethod
    def activation_input(self, name: str, shape: Sequence[int], encoding: Encoding | None = None) -> Symbol:
        """A float32 input."""

    @abstractmethod
    def cache_input(self, name: str, shape: Sequence[int], value: str) -> Symbol:
        """The cached slots of `value` (a name of the lowered decoder), as the step before gave them out."""

    @abstractmethod
    def activation_output(self, x: Symbol, name: str) -> None:
        """Make x the float32 output `name`."""

    @abstractmethod
    def cache_output(self, x: Symbol, name: str) -> None:
        """Make x the output `name`, in the cache's own type."""

    @abstractmethod
    def constant(self, array: np.ndarray, name: str) -> Symbol: ...

    @abstractmethod
    def vector(self, name: str) -> Symbol: ...

    @abstractmethod
    def linear(self, x: Symbol, weight: str, name: str) -> Symbol: ...

    @abstractmethod
    def rms_norm(self, x: Symbol, weight: str, name: str) -> Symbol: ...

    @abstractmethod
    def masked_softmax(self, scores: Symbol, mask: Symbol, name: str) -> Symbol: ...

    @abstractmethod
    def silu(self, x: Symbol, name: str) -> Symbol: ...

    @abstractmethod
    def cached(self, x: Symbol, name: str) -> Symbol: ...

    def add(self, a: Symbol, b: Symbol, name: str) -> Symbol:
        return self.emit("Add", [a.name, b.name], name, np.broadcast_shapes(a.shape, b.shape))

    def multiply(self, a: Symbol, b: Symbol, name: str) -> Symbol:
        return self.emit("Mul", [a.name, b.name], name, np.broadcast_shapes(a.shape, b.shape))

    def scale(self, x: Symbol, factor: float, name: str) -> Symbol:
        return self.multiply(x, self.constant(np.array(factor, np.float32), f"{name}.factor"), name)

    def matmul(self, a: Symbol, b: Symbol, name: str) -> Symbol:
        return self.emit("MatMul", [a.name, b.name], name, (*a.shape[:-1], b.shape[-1]))

    def gather(self, table: Symbol, rows: Symbol, name: str) -> Symbol:
        shape = (*rows.shape, *table.shape[1:])
        return self.emit("Gather", [table.name, rows.name], name, shape, table.encoding, axis=0)

    def reshape(self, x: Symbol, shape: Sequence[int]) -> Symbol:
        target = self.graph.initializer("shape." + "x".join(map(str, shape)), np.asarray(shape, np.int64))
        return self._move("Reshape", [x], shape, [target])

    def transpose(self, x: Symbol, axes: Sequence[int]) -> Symbol:
        return self._move("Transpose", [x], [x.shape[axis] for axis in axes], perm=list(axes))

    def slice(self, x: Symbol, axis: int, start: int, stop: int) -> Symbol:
        shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
        bounds = [self.graph.initializer(f"index.{v}", np.array([v], np.int64)) for v in (start, stop, axis)]
        return self._move("Slice", [x], shape, bounds)

    def concat(self, parts: Sequence[Symbol], axis: int) -> Symbol:
        first = parts[0]
        assert all(part.encoding == first.encoding for part in parts), [part.name for part in parts]
        shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
        return self._move("Concat", parts, shape, axis=axis)

    def _move(
        self,
        kind: str,
        parts: Sequence[Symbol],
        shape: Sequence[int],
        extra: Sequence[str] = (),
        **attributes: Any,
    ) -> Symbol:
        source = parts[-1].name  # of a concat with the cache: the new part
        count = self._moves[source] = self._moves.get(source, 0) + 1
        inputs = [part.name for part in parts] + list(extra)
        name = f"{source}/{kind.lower()}{count}"
        return self.emit(kind, inputs, name, shape, parts[0].encoding, **attributes)
