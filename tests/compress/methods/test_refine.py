"""Learned rounding: the block comes nearer to the float model's, on the grid that runtimes hold; same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.model import DecoderBlock
from bluelm.system.files import demo_checkpoint
from calibration.samples import Samples, load_samples
from calibration.walk import Streams
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.methods.refine import refine, relative_error
from compress.recipe import Recipe
from tests.support.checkpoints.shapes import LINEARS, shortened

VALUES = {"samples": 32, "length": 128, "sweeps": 0}  # of so few tokens, sweeps and refining learn too much by heart


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The demo model's first block."""
    return Checkpoint.open(shortened(demo_checkpoint(), 1, tmp_path_factory.mktemp("short") / "float"))


@pytest.fixture(scope="module")
def samples(short: Checkpoint) -> Samples:
    return load_samples(None, short.tokenizer(), 32, 128, 0)


@pytest.fixture(scope="module")
def unseen(short: Checkpoint) -> Samples:
    return load_samples(None, short.tokenizer(), 32, 128, 1)


@pytest.fixture(scope="module")
def plain(short: Checkpoint, samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return quantize(short, samples, Recipe.make(VALUES), tmp_path_factory.mktemp("plain") / "q")


def lost(short: Checkpoint, quantized: QuantizedCheckpoint, tokens: Tensor) -> float:
    """Relative error of the block's output in float64, worked out from the folder alone."""
    streams = Streams(short.config, quantized.embedding()[tokens], short.embedding()[tokens])
    block = DecoderBlock.from_weights(short.config, quantized.block(0)).double()
    exact = DecoderBlock.from_weights(short.config, short.block(0)).double()
    cos, sin = streams.cos.double(), streams.sin.double()
    assert streams.exact is not None
    found, wanted = block(streams.hidden.double(), cos, sin), exact(streams.exact.double(), cos, sin)
    return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_block_comes_nearer_to_the_float_model(
    short: Checkpoint, samples: Samples, unseen: Samples, plain: QuantizedCheckpoint, tmp_path: Path, symmetric: bool
) -> None:
    start = plain
    if not symmetric:
        start = quantize(short, samples, Recipe.make({**VALUES, "symmetric": False}), tmp_path / "plain")
    asked = Recipe.make({**VALUES, "symmetric": symmetric, "refine": 60})
    refined = quantize(short, samples, asked, tmp_path / "refined")
    assert lost(short, refined, samples.tokens) < 0.9 * lost(short, start, samples.tokens)
    assert lost(short, refined, unseen.tokens) < lost(short, start, unseen.tokens)
    for name in LINEARS:
        weight = refined.linear(f"model.layers.0.{name}")
        assert torch.equal(weight.scales, weight.scales.to(torch.bfloat16).to(torch.float16)), "XNNPACK holds bfloat16"
        assert torch.equal(weight.zeros, start.linear(f"model.layers.0.{name}").zeros)
        note = refined.info["layers"][f"model.layers.0.{name}"]["refine"]
        flipped = (weight.codes != start.linear(f"model.layers.0.{name}").codes).float().mean().item()
        assert note["flipped"] == pytest.approx(flipped, abs=1e-4)
        assert 0 < flipped < 0.2
        assert note["loss_after"] < note["loss_before"]


def test_no_step_changes_nothing_but_what_was_out_of_place(short: Checkpoint, plain: QuantizedCheckpoint) -> None:
    solved = {name: plain.linear(f"model.layers.0.{name}") for name in LINEARS}
    tensors = short.block(0)
    block = DecoderBlock.from_weights(short.config, tensors)
    streams = Streams(short.config, torch.randn(2, 8, short.config.hidden_size))
    weights = {name: tensors[f"{name}.weight"] for name in LINEARS}
    rotary = (streams.cos, streams.sin)
    found = refine(block, weights, solved, streams.hidden, streams.hidden, rotary, steps=1, seed=0)
    # one step moves a code by 0.05 at most, and none begins within 0.3 of an edge
    assert all(torch.equal(found.weights[name].codes, solved[name].codes) for name in LINEARS)


def test_the_same_seed_gives_the_same_codes(short: Checkpoint, plain: QuantizedCheckpoint) -> None:
    solved = {name: plain.linear(f"model.layers.0.{name}") for name in LINEARS}
    tensors = short.block(0)
    block = DecoderBlock.from_weights(short.config, tensors)
    streams = Streams(short.config, 0.1 * torch.randn(32, 64, short.config.hidden_size))
    rotary = (streams.cos, streams.sin)
    targets = block(streams.hidden, *rotary)
    weights = {name: tensors[f"{name}.weight"] for name in LINEARS}
    first, again = (refine(block, weights, solved, streams.hidden, targets, rotary, steps=8, seed=3) for _ in range(2))
    assert first.after < first.before
    for name in LINEARS:
        assert torch.equal(first.weights[name].codes, again.weights[name].codes)
        assert torch.equal(first.weights[name].scales, again.weights[name].scales)


def test_tokens_weigh_by_their_own_size() -> None:
    wanted = torch.tensor([[1.0, 1.0], [100.0, 100.0]])
    found = wanted + torch.tensor([[0.1, 0.0], [0.0, 10.0]])
    assert relative_error(found, wanted).item() == pytest.approx((0.01 / 2 + 100 / 20000) / 2)


def test_rounding_alone_cannot_be_refined() -> None:
    with pytest.raises(InputError, match="reads no text"):
        Recipe.make({"method": "rtn", "refine": 10})


def test_codes_that_training_would_make_worse_stay(short: Checkpoint, plain: QuantizedCheckpoint) -> None:
    """Targets that the codes given meet exactly: there is nothing to gain."""
    solved = {name: plain.linear(f"model.layers.0.{name}") for name in LINEARS}
    streams = Streams(short.config, torch.randn(2, 8, short.config.hidden_size))
    rotary = (streams.cos, streams.sin)
    block = DecoderBlock.from_weights(short.config, plain.block(0))
    targets = block(streams.hidden, *rotary)
    weights = {name: short.block(0)[f"{name}.weight"] for name in LINEARS}
    found = refine(block, weights, solved, streams.hidden, targets, rotary, steps=3, seed=0)
    assert found.weights == solved
    assert found.before == found.after == pytest.approx(0, abs=1e-12)
    assert not any(found.flipped.values())
