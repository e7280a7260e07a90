"""`Ops` executed by torch: plain float32, watched for ranges, or every activation rounded to 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bluelm.weights import Weights
from export.lowering.encoding import SHARE, Encoding

MASKED_BELOW = 20.0
"""A masked attention score is held this far below the least visible one; exp(-20) is far below 2**-17."""


class Encodings(Protocol):
    """Encodings by value name: `Ranges`."""

    def encoding(self, name: str) -> Encoding: ...

    def cache_encoding(self, name: str) -> Encoding: ...


class Activations(Protocol):
    """What happens to each value on its way through the decoder."""

    def value(self, name: str, x: Tensor) -> Tensor:
        """The outcome of an operation that computes."""
        ...

    def cached(self, name: str, x: Tensor) -> Tensor:
        """Keys or values on their way into the cache."""
        ...

    def share(self, x: Tensor) -> Tensor:
        """A number from 0 to 1: softmax or sigmoid."""
        ...

    def masked(self, name: str, x: Tensor, visible: Tensor) -> Tensor:
        """Attention scores plus mask; the `visible` ones must be held, the rest be far below them."""
        ...

    def constant(self, x: Tensor) -> Tensor:
        """A norm's gamma or a table."""
        ...


class Plain:
    """Activations as they are."""

    def value(self, name: str, x: Tensor) -> Tensor:
        return x

    def cached(self, name: str, x: Tensor) -> Tensor:
        return self.value(name, x)

    def share(self, x: Tensor) -> Tensor:
        return x

    def masked(self, name: str, x: Tensor, visible: Tensor) -> Tensor:
        return x

    def constant(self, x: Tensor) -> Tensor:
        return x


class Recorded(Plain):
    """Activations as they are, their least and greatest kept in `seen`."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, float]] = {}

    def value(self, name: str, x: Tensor) -> Tensor:
        low, high = (float(v) for v in x.aminmax())
        if name in self.seen:
            low, high = min(low, self.seen[name][0]), max(high, self.seen[name][1])
        self.seen[name] = (low, high)
        return x

    def masked(self, name: str, x: Tensor, visible: Tensor) -> Tensor:
        low = x.masked_fill(~visible, torch.inf).min()
        high = x.masked_fill(~visible, -torch.inf).max()
        self.value(name, torch.stack([low - MASKED_BELOW, high]))
        return x


class Rounded:
    """Every activation, gamma and table rounded to the 16 bits that the NPU artifact holds."""

    def __init__(self, ranges: Encodings) -> None:
        self._ranges = ranges

    def value(self, name: str, x: Tensor) -> Tensor:
        return self._ranges.encoding(name).round_trip(x)

    def cached(self, name: str, x: Tensor) -> Tensor:
        return self._ranges.cache_encoding(name).round_trip(x)

    def share(self, x: Tensor) -> Tensor:
        return SHARE.round_trip(x)

    def masked(self, name: str, x: Tensor, visible: Tensor) -> Tensor:
        return self.value(name, x)

    def constant(self, x: Tensor) -> Tensor:
        low, high = x.aminmax()
        return Encoding.of_range(float(low), float(high)).round_trip(x)


class Parameters:
    """Tensors of a `Weights` by full name. Holds one block at a time, or with `keep` all that it has read."""

    def __init__(self, weights: Weights, keep: bool = False) -> None:
        self._weights, self._keep = weights, keep
        self._held: dict[str, dict[str, Tensor]] = {}

    def __call__(self, name: str) -> Tensor:
        """float32 tensor such as `model.layers.0.mlp.up_proj`, `model.norm` or `lm_head`: no `.weight`.

        A bias has its full name.
        """
        parts = name.split(".")
        in_block = parts[:2] == ["model", "layers"]
        kind = [] if parts[-1] == "bias" else ["weight"]
        place, local = (".".join(parts[:3]), ".".join([*parts[3:], *kind])) if in_block else (name, "weight")
        if place not in self._held:
            if not self._keep:
                self._held.clear()  # before the next is read: never two at a time
            self._held[place] = self._read(place)
        return self._held[place][local]

    def _read(self, place: str) -> dict[str, Tensor]:
        if place == "lm_head":
            return {"weight": self._weights.head()}
        if place == "model.norm":
            return {"weight": self._weights.final_norm()}
        return self._weights.block(int(place.rsplit(".", 1)[1]))


class TorchOps:
    """Runs the lowered decoder on float32 tensors; `activations` sees, and may change, every value."""

    def __init__(self, parameters: Parameters, epsilon: float, activations: Activations | None = None) -> None:
        self._parameters = parameters
        self._epsilon = epsilon
        self._activations: Activations = activations or Plain()

    def input(self, name: str, x: Tensor) -> Tensor:
        """A value that comes from outside the graph."""
        return self._activations.value(name, x)

    def constant(self, array: np.ndarray, name: str) -> Tensor:
        return self._activations.constant(torch.from_numpy(np.ascontiguousarray(array, np.float32)))

    def vector(self, name: str) -> Tensor:
        return self._activations.constant(self._parameters(name))

    def linear(self, x: Tensor, weight: str, name: str) -> Tensor:
        return self._activations.value(name, x @ self._parameters(weight).T)

    def rms_norm(self, x: Tensor, weight: str, name: str) -> Tensor:
        unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._epsilon)
        unit = self._activations.value(f"{name}.unit", unit)
        return self._activations.value(name, unit * self._activations.constant(self._parameters(weight)))

    def gather(self, table: Tensor, rows: Tensor, name: str) -> Tensor:
        return table[rows]

    def add(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        return self._activations.value(name, a + b)

    def multiply(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        return self._activations.value(name, a * b)

    def scale(self, x: Tensor, factor: float, name: str) -> Tensor:
        return self._activations.value(name, x * self._activations.constant(torch.tensor(factor)))

    def matmul(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        return self._activations.value(name, a @ b)

    def masked_softmax(self, scores: Tensor, mask: Tensor, name: str) -> Tensor:
        masked = self._activations.masked(f"{name}.masked", scores + mask, mask == 0)
        return self._activations.share(torch.softmax(masked, -1))

    def silu(self, x: Tensor, name: str) -> Tensor:
        gate = self._activations.share(torch.sigmoid(x))
        return self._activations.value(name, x * gate)

    def cached(self, x: Tensor, name: str) -> Tensor:
        return self._activations.cached(name, x)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(tuple(shape))

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.permute(tuple(axes))

    def slice(self, x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        return x.narrow(axis, start, stop - start)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(parts), axis)
