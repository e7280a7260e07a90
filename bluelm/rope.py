"""Rotary position embedding: inverse frequencies of each scaling, and the tables of cosines and sines.

All arithmetic is float32, in the order in which transformers does it, so that tables agree to the bit.
d = head_dim, j = 0 .. d/2-1 counts pairs; dimension j turns with dimension j + d/2 (half-split).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bluelm.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, seq_len: int | None = None) -> Tensor:
    """Angle per position of each pair, float32 [head_dim/2].

    - none: theta**(-2j/d) (Su et al., arXiv 2104.09864)
    - linear: divided by factor (Chen et al., arXiv 2306.15595)
    - dynamic: theta grows with `seq_len` above max_position_embeddings (NTK-aware, as in transformers)
    - llama3: long waves divided by factor, short ones kept, a ramp between (Llama 3.1)
    - ntkmixed: vivo's BlueLM 32K, divided by exp(a * (j+1)**power) with a = ln(factor) / (d/2)**power

    Args:
        seq_len: length of the whole sequence; only dynamic looks at it. None: up to max_position_embeddings.
    """
    turning = _frequencies(config, seq_len)  # [rotary_dim/2]
    return F.pad(turning, (0, config.head_dim // 2 - turning.shape[0]))


def _frequencies(config: ModelConfig, seq_len: int | None) -> Tensor:
    """Of the dimensions that turn, float32 [rotary_dim/2]."""
    scaling, theta, size = config.rope_scaling, config.rope_theta, config.rotary_dim
    if scaling is None:
        return _plain(theta, size)
    match scaling.kind:
        case "linear":
            return _plain(theta, size) / scaling.factor
        case "dynamic":
            longest = config.max_position_embeddings
            stretch = scaling.factor * max(seq_len or 0, longest) / longest - (scaling.factor - 1)
            return _plain(theta * stretch ** (size / (size - 2)), size)
        case "llama3":
            return _llama3(_plain(theta, size), scaling)
        case "ntkmixed":
            assert scaling.power is not None
            a = math.log(scaling.factor) / (size / 2) ** scaling.power
            pairs = torch.arange(1, size // 2 + 1, dtype=torch.float32)
            return _plain(theta, size) / torch.exp(a * pairs**scaling.power)


def max_context(config: ModelConfig) -> int:
    """The longest sequence the model is meant for, in tokens.

    max_position_embeddings times factor for linear, dynamic and ntkmixed; llama3 configurations name the long
    context itself.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":
        return config.max_position_embeddings
    return int(config.max_position_embeddings * scaling.factor)


def rope_rows(frequencies: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) float32 [stop - start, head_dim] of positions start .. stop-1; both halves repeated."""
    positions = torch.arange(start, stop, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)  # [T, head_dim/2]
    angles = torch.cat((angles, angles), dim=-1)  # [T, head_dim]
    return angles.cos(), angles.sin()


def rope_table(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) float32 [length, head_dim] of a sequence, or a static context, of `length` tokens."""
    return rope_rows(inverse_frequencies(config, length), 0, length)


def _plain(theta: float, head_dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    low, high, original = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    assert low is not None and high is not None and original is not None
    waves = 2 * math.pi / plain  # positions per full turn
    keep = ((original / waves - low) / (high - low)).clamp(0, 1)  # 1 for short waves, 0 for long ones
    return (1 - keep) * plain / scaling.factor + keep * plain
