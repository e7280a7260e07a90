"""The numbers that constants of onnx-cpu and onnx-npu must hold, computed from the checkpoint and formulas alone.

onnx-cpu  float32: norms, biases, rope tables (the first half of the sines negative), head_dim**-0.5
onnx-npu  the same as uint16 codes that span least to greatest, and an encoding for every value of the graph
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bluelm.block import block_of
from bluelm.rope import rope_table
from compress.checkpoint.store import QuantizedCheckpoint
from export.lowering.ranges import Ranges
from export.readback import items

HIDDEN_SCORE = -10000.0
"""Added to scores in float32 graphs: exp of it is 0."""
LEAST_MASK = 100.0
"""At least so deep is the mask of integer graphs."""
HEADROOM_8_BITS = 1.25
"""Widens the ranges of an 8-bit cache."""
CACHED = (
    re.compile(r"layers\.(?P<layer>\d+)\.(?P<kind>keys|values)"),
    re.compile(r"(past_)?(?P<kind>keys|values)\.(?P<layer>\d+)(\.values)?"),
)
"""How values of the cache are called inside, and at the border."""
BETWEEN_0_AND_1 = (np.float32(2.0**-16), np.uint16(0))
"""Softmax and sigmoid."""


class Code(NamedTuple):
    """value = (code - zero) * scale; float32, and the code's type."""

    scale: np.float32
    zero: np.generic


class NamedConstant(NamedTuple):
    """A constant's item, and its values in float32 when they are asked for."""

    item: str
    values: Callable[[], np.ndarray]


def span(low: float, high: float, kind: type[np.unsignedinteger] = np.uint16) -> Code:
    """Unsigned codes of which the least stands for `low`, the greatest for `high`, and one for 0 exactly."""
    low, high, steps = min(low, 0.0), max(high, 0.0), np.iinfo(kind).max
    scale = np.float32((high - low) / steps) if high > low else np.float32(1)
    scale = max(scale, np.finfo(np.float32).tiny)
    return Code(scale, kind(min(max(round(-low / float(scale)), 0), steps)))


def around(low: float, high: float, kind: type[np.signedinteger]) -> Code:
    """Signed codes around 0."""
    largest = max(-low, high)
    scale = np.float32(largest / np.iinfo(kind).max) if largest > 0 else np.float32(1)
    return Code(max(scale, np.finfo(np.float32).tiny), kind(0))


def codes(values: np.ndarray) -> np.ndarray:
    """A float32 constant as uint16 codes that span its own values: round to nearest, ties to even."""
    code = span(float(values.min()), float(values.max()))
    whole = np.rint(values / code.scale) + np.float32(code.zero)
    return np.clip(whole, 0, np.iinfo(np.uint16).max).astype(np.uint16)


@dataclass(frozen=True)
class Constants:
    """What the constants of a lowered decoder must be, by their names in the graph."""

    quantized: QuantizedCheckpoint
    context: int

    @cached_property
    def tables(self) -> Mapping[str, NamedConstant]:
        """Those that hold numbers of the model."""
        config = self.quantized.config
        found = {
            name.removesuffix(".weight"): NamedConstant(name, self._vector(name))
            for name in items.vector_names(self.quantized)
        }
        factor = np.array(config.head_dim**-0.5, np.float32)
        for layer in range(config.num_layers):
            found[f"layers.{layer}.q_scaled.factor"] = NamedConstant(items.attention_scale(layer), lambda: factor)
        found["rope.cos.table"] = NamedConstant(items.ROPE, lambda: self._rope[0])
        found["rope.sin.table"] = NamedConstant(items.ROPE, lambda: self._rope[1])
        return found

    @cached_property
    def norms(self) -> Mapping[str, str]:
        """A norm's weight by the name of the norm's outcome in the graph."""
        config = self.quantized.config
        found = {
            f"layers.{layer}.{norm.makes}": f"model.layers.{layer}.{norm.weight}.weight"
            for layer in range(config.num_layers)
            for norm in block_of(config).norms.values()
        }
        return found | {"final_norm": "model.norm.weight"}

    def order(self, name: str) -> np.ndarray | None:
        """`….order`: the columns of a weight whose inputs are put in order."""
        info = self.quantized.linears.get(name.removesuffix(".order"))
        if not name.endswith(".order") or info is None or not info.ordered:
            return None
        order = self.quantized.ordered(name.removesuffix(".order")).order
        return None if order is None else order.numpy()

    @staticmethod
    def said(name: str) -> np.ndarray | None:
        """Shapes, bounds and encodings, whose names say their values: shape.1x8x64, index.4, zero.uint16.77."""
        kind, _, value = name.partition(".")
        try:
            if kind == "shape":
                return np.array([int(size) for size in value.split("x")], np.int64)
            if kind == "index":
                return np.array([int(value)], np.int64)
            if kind == "scale":
                return np.array(int(value, 16), np.uint32).view(np.float32)
            if kind == "zero":
                dtype, _, number = value.partition(".")
                return np.array(int(number), dtype)
        except (ValueError, TypeError, OverflowError):
            pass  # a name that says something else
        return None

    def _vector(self, name: str) -> Callable[[], np.ndarray]:
        return lambda: self.quantized.vector(name).numpy()

    @cached_property
    def _rope(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [context, head_dim] each; swap(x) * sin needs the first half's sign turned."""
        cos, sin = (table.numpy() for table in rope_table(self.quantized.config, self.context))
        signs = np.repeat(np.array([-1, 1], np.float32), sin.shape[1] // 2)
        return cos, sin * signs


@dataclass(frozen=True)
class Encodings:
    """The code of every value of an integer graph, from the ranges beside it."""

    ranges: Ranges
    constants: Constants
    cache_bits: int

    @property
    def mask_value(self) -> float:
        """Deep enough for any score: from the greatest score to the least masked one, whole, at least 100."""
        depth, wide = LEAST_MASK, self.ranges.headroom
        for name, (low, _) in self.ranges.values.items():
            if name.endswith("shares.masked"):
                _, greatest = self.ranges.values.get(name.replace("shares.masked", "scores"), (0.0, math.inf))
                depth = max(depth, greatest * wide - low * wide)
        if not math.isfinite(depth):
            return math.nan  # ranges without scores: no mask is right
        return float(-math.ceil(depth))

    def of(self, name: str) -> Code | None:
        """Of a value by its node's name; None: the ranges do not know it."""
        base = name.removesuffix(".codes").split("/")[0]
        cached = CACHED[0].fullmatch(base) or CACHED[1].fullmatch(base)
        if cached is not None:
            return self._cached(f"layers.{cached['layer']}.{cached['kind']}")
        base = base.removesuffix(".values")
        if base.endswith((".shares", ".sigmoid")):
            return Code(*BETWEEN_0_AND_1)
        if base == "mask":
            depth = self.mask_value
            return span(depth, 0.0) if math.isfinite(depth) else None
        table = self.constants.tables.get(base) or self.constants.tables.get(f"{base}.table")
        if table is not None:
            values = table.values()
            return span(float(values.min()), float(values.max()))
        if base not in self.ranges.values:
            return None
        low, high = (bound * self.ranges.headroom for bound in self.ranges.values[base])
        fine = self.ranges.activation_bits == 16 or base.endswith(".masked")
        return span(low, high, np.uint16 if fine else np.uint8)

    def _cached(self, name: str) -> Code | None:
        if name not in self.ranges.values:
            return None
        wide = HEADROOM_8_BITS if self.cache_bits == 8 else self.ranges.headroom
        low, high = (bound * wide for bound in self.ranges.values[name])
        return around(low, high, np.int8 if self.cache_bits == 8 else np.int16)
