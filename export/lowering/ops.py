"""The primitive operations that phones know: the lowered decoder is written against them once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np


class Shaped(Protocol):
    """A value of any backend: a torch tensor, or the symbol of an ONNX or MIL value."""

    @property
    def shape(self) -> Sequence[int]: ...


V = TypeVar("V", bound=Shaped)


class Ops(Protocol[V]):
    """What a backend offers. `name` names the outcome, the same in every backend, and is its range's key.

    Operations that compute take a name; operations that only move data (reshape, transpose, slice, concat)
    take none: their outcome holds the values, and so the encoding, of what went in.
    """

    def constant(self, array: np.ndarray, name: str) -> V:
        """A float32 table baked into the graph."""
        ...

    def vector(self, name: str) -> V:
        """A vector of the checkpoint, a bias by its full name, as a constant."""
        ...

    def linear(self, x: V, weight: str, name: str) -> V:
        """x [..., in] @ W.T, W [out, in] being the tensor `weight` of the checkpoint (without `.weight`)."""
        ...

    def rms_norm(self, x: V, weight: str, name: str) -> V:
        """x / sqrt(mean(x**2) + eps) * gamma over the last axis; gamma [n] is the tensor `weight`. x is [1, m, n]."""
        ...

    def gather(self, table: V, rows: V, name: str) -> V:
        """table [n, d], rows integer [T] -> [T, d]; holds the table's own values."""
        ...

    def add(self, a: V, b: V, name: str) -> V: ...

    def multiply(self, a: V, b: V, name: str) -> V: ...

    def scale(self, x: V, factor: float, name: str) -> V: ...

    def matmul(self, a: V, b: V, name: str) -> V: ...

    def masked_softmax(self, scores: V, mask: V, name: str) -> V:
        """softmax(scores + mask) over the last axis; mask is 0 or a large negative number."""
        ...

    def silu(self, x: V, name: str) -> V: ...

    def cached(self, x: V, name: str) -> V:
        """x as the KV cache holds it."""
        ...

    def reshape(self, x: V, shape: Sequence[int]) -> V: ...

    def transpose(self, x: V, axes: Sequence[int]) -> V: ...

    def slice(self, x: V, axis: int, start: int, stop: int) -> V: ...

    def concat(self, parts: Sequence[V], axis: int) -> V:
        """The parts must share one encoding."""
        ...
