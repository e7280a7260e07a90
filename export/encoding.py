"""How a 16-bit activation holds real numbers: value = (code - zero) * scale, codes 0 to 65535."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoding:
    """Scale (exactly a float32), zero point and code type of one tensor; value = (code - zero) * scale."""

    scale: float
    zero: int
    dtype: Literal["uint16", "int16"] = "uint16"

    @classmethod
    def of_range(cls, low: float, high: float) -> Encoding:
        """uint16 codes that span [low, high] widened to hold zero, which they hold exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = _scale(high - low, 65535)
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, 65535)))

    @classmethod
    def symmetric(cls, low: float, high: float) -> Encoding:
        """int16 codes with zero point 0 that span [low, high]."""
        return cls(_scale(max(-low, high), 32767), 0, "int16")

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
