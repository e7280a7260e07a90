"""Rotary frequencies against formulas written out in Python's own arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bluelm.config import ModelConfig
from bluelm.model import rotate
from bluelm.rope import inverse_frequencies, max_context, rope_rows, rope_table
from tests.support.checkpoints.shapes import config_dict


def config(head_dim: int = 16, **more: Any) -> ModelConfig:
    return ModelConfig.from_dict(config_dict(head_dim=head_dim, **more))


@settings(max_examples=60)
@given(
    half=st.integers(2, 64),
    factor=st.floats(1, 64),
    power=st.floats(0.05, 2),
    theta=st.sampled_from([100.0, 10000.0, 500000.0]),
)
def test_ntkmixed_is_vivos_formula(half: int, factor: float, power: float, theta: float) -> None:
    scaling = {"type": "ntkmixed", "factor": factor, "power": power}
    got = inverse_frequencies(config(2 * half, rope_theta=theta, rope_scaling=scaling))
    a = math.log(factor) / half**power
    want = [theta ** (-2 * j / (2 * half)) / math.exp(a * (j + 1) ** power) for j in range(half)]
    torch.testing.assert_close(got, torch.tensor(want), rtol=2e-5, atol=0)
    plain_last = theta ** (-2 * (half - 1) / (2 * half))
    assert float(got[-1]) == pytest.approx(plain_last / factor, rel=2e-5)  # slowed by exactly the factor


def test_bluelm_32k_by_hand() -> None:
    """BlueLM-7B-Chat-32K: head_dim 128, factor 16, power 0.3; first and last pair worked out apart."""
    scaling = {"type": "ntkmixed", "factor": 16.0, "power": 0.3}
    got = inverse_frequencies(config(128, rope_scaling=scaling, max_position_embeddings=2048))
    # a = ln 16 / 64**0.3 = 2.7725887 / 3.4822022 = 0.7962170; exp(-a) = 0.4510322
    assert float(got[0]) == pytest.approx(0.4510322, rel=1e-5)
    assert float(got[63]) == pytest.approx(10000 ** (-126 / 128) / 16, rel=1e-5)
    assert max_context(config(128, rope_scaling=scaling, max_position_embeddings=2048)) == 32768


def test_plain_and_linear_frequencies_by_hand() -> None:
    plain = [10000 ** (-2 * j / 16) for j in range(8)]
    torch.testing.assert_close(inverse_frequencies(config()), torch.tensor(plain), rtol=1e-6, atol=0)
    linear = inverse_frequencies(config(rope_scaling={"type": "linear", "factor": 4.0}))
    torch.testing.assert_close(linear, torch.tensor(plain) / 4, rtol=1e-6, atol=0)


def test_dynamic_stretches_only_beyond_the_trained_length() -> None:
    plain = inverse_frequencies(config())
    dynamic = config(rope_scaling={"type": "dynamic", "factor": 4.0})  # max_position_embeddings 128
    for length in (None, 1, 128):
        assert torch.equal(inverse_frequencies(dynamic, length), plain)
    longer = inverse_frequencies(dynamic, 256)
    base = 10000 * (4 * 256 / 128 - 3) ** (16 / 14)
    torch.testing.assert_close(longer, torch.tensor([base ** (-2 * j / 16) for j in range(8)]), rtol=1e-5, atol=0)
    assert torch.equal(rope_table(dynamic, 256)[0], rope_rows(longer, 0, 256)[0])


def test_llama3_keeps_short_waves_and_slows_long_ones() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    got = inverse_frequencies(config(32, rope_scaling=scaling))
    for j, value in enumerate(got.tolist()):
        plain = 10000 ** (-2 * j / 32)
        wave = 2 * math.pi / plain
        smooth = (64 / wave - 1) / 3
        want = plain if wave < 16 else plain / 8 if wave > 64 else plain * ((1 - smooth) / 8 + smooth)
        assert value == pytest.approx(want, rel=1e-5)
    assert len({round(10000 ** (-2 * j / 32) / value, 3) for j, value in enumerate(got.tolist())}) > 2


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 128),
        ({"type": "linear", "factor": 4.0}, 512),
        ({"type": "dynamic", "factor": 2.5}, 320),
        ({"type": "ntkmixed", "factor": 16, "power": 0.3}, 2048),
        ({"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}, 128),
    ],
)
def test_max_context(scaling: dict[str, object] | None, context: int) -> None:
    assert max_context(config(rope_scaling=scaling)) == context


@settings(max_examples=60)
@given(st.integers(0, 500), st.integers(1, 20))
def test_rows_are_rows_of_the_table(start: int, count: int) -> None:
    cos, sin = rope_table(config(), start + count)
    got_cos, got_sin = rope_rows(inverse_frequencies(config()), start, start + count)
    assert torch.equal(got_cos, cos[start:])
    assert torch.equal(got_sin, sin[start:])


def test_rotation_turns_pairs_as_complex_numbers() -> None:
    x = torch.randn(1, 1, 5, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_table(config(), 5)
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double())
    angles = torch.outer(torch.arange(5.0), inverse_frequencies(config())).double()
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    want = torch.cat((turned.real, turned.imag), -1).float()
    torch.testing.assert_close(rotate(x, cos, sin), want, rtol=1e-5, atol=1e-5)
