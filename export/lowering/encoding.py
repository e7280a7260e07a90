"""How a 16- or 8-bit activation holds real numbers: value = (code - zero) * scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Bits = Literal[8, 16]


@dataclass(frozen=True)
class Encoding:
    """Scale (exactly a float32), zero point and code type of one tensor; value = (code - zero) * scale."""

    scale: float
    zero: int
    dtype: Literal["uint16", "int16", "uint8", "int8"] = "uint16"

    @classmethod
    def of_range(cls, low: float, high: float, bits: Bits = 16) -> Encoding:
        """Unsigned codes that span [low, high] widened to hold zero, which they hold exactly."""
        low, high, steps = min(low, 0.0), max(high, 0.0), 2**bits - 1
        scale = _scale(high - low, steps)
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, steps)), "uint16" if bits == 16 else "uint8")

    @classmethod
    def symmetric(cls, low: float, high: float, bits: Bits = 16) -> Encoding:
        """Signed codes with zero point 0 that span [low, high]."""
        scale = _scale(max(-low, high), 2 ** (bits - 1) - 1)
        return cls(scale, 0, "int16" if bits == 16 else "int8")

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and greatest code."""
        limits = np.iinfo(self.dtype)
        return int(limits.min), int(limits.max)

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """float32 to codes, round half to even, saturating: ONNX QuantizeLinear."""
        codes = np.rint(x / np.float32(self.scale)) + np.float32(self.zero)
        return np.clip(codes, *self.bounds).astype(self.dtype)

    def dequantize(self, codes: np.ndarray) -> np.ndarray:
        """Codes to float32: ONNX DequantizeLinear."""
        return (codes.astype(np.int32) - self.zero).astype(np.float32) * np.float32(self.scale)

    def round_trip(self, x: Tensor) -> Tensor:
        """float32 to the nearest float32 that a code stands for."""
        codes = torch.clamp(torch.round(x / self.scale) + self.zero, *self.bounds)
        return (codes - self.zero) * self.scale


SHARE = Encoding(2.0**-16, 0)
"""Of numbers from 0 to 1, the outcome of softmax and sigmoid: the one that HTP wants for them."""


def _scale(span: float, steps: int) -> float:
    """`span` / `steps` as a float32 that is never zero nor subnormal."""
    return float(max(np.float32(span / steps), np.finfo(np.float32).tiny)) if span > 0 else 1.0
