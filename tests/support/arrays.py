"""Arrays that tests of operations compute with, and what they are held against."""

from __future__ import annotations

import numpy as np


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """float32, drawn from a normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    powers = np.exp(x.astype(np.float64))
    return powers / powers.sum(-1, keepdims=True)
