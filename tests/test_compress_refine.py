"""Learned rounding: the block comes nearer to the float model's, on the grid that runtimes hold; same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.files import demo_checkpoint
from bluelm.model import DecoderBlock
from bluelm.weights import LINEARS
from calibration.samples import Samples, load_samples
from calibration.walk import Streams
from compress.engine import quantize
from compress.quantized import QuantizedTensor
from compress.recipe import Recipe
from compress.refine import Refined, _Latent, refine, relative_error
from compress.rtn import round_to_nearest
from compress.store import QuantizedCheckpoint
from tests.rounded import shortened
from tests.test_compress_awq import random_block, small_config

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


def test_latents_begin_at_the_weight_but_near_their_code() -> None:
    """Codes 7 to 10, zero point 8, scale 0.5; weights that lie off by what stands in the third line."""
    codes = torch.tensor([[7, 8, 9, 10]], dtype=torch.uint8)
    scales, zeros = torch.full((1, 1), 0.5, dtype=torch.float16), torch.full((1, 1), 8, dtype=torch.uint8)
    off = torch.tensor([[0.1, -0.05, 0.4, -0.4]])
    latent = _Latent((codes.float() - 8 + off) * 0.5, QuantizedTensor(codes, scales, zeros, 4, 4))
    torch.testing.assert_close(latent.codes.detach().view(1, 4), codes + torch.tensor([[0.1, -0.05, 0.2, -0.2]]))
    torch.testing.assert_close(latent.dequantize(), (codes.float() - 8) * 0.5)
    assert torch.equal(latent.freeze().codes, codes)
    with torch.no_grad():
        latent.codes.view(1, 4).copy_(torch.tensor([[-3.0, 8.6, 40.0, 15.4]]))
        latent.stretch.fill_(1.5)
    torch.testing.assert_close(latent.dequantize(), (torch.tensor([[0.0, 9.0, 15.0, 15.0]]) - 8) * 0.75)
    frozen = latent.freeze()
    assert frozen.codes.tolist() == [[0, 9, 15, 15]] and frozen.scales.tolist() == [[0.75]]
    assert torch.equal(frozen.zeros, zeros) and (frozen.bits, frozen.group_size) == (4, 4)
    latent.dequantize().sum().backward()
    assert latent.codes.grad is not None
    assert latent.codes.grad.view(-1).tolist() == [0.0, 0.75, 0.0, 0.75]  # none beyond the least and greatest code


def pushed(steps: int, *, by: int = 0, stretch: float = 1.0) -> tuple[Refined, QuantizedTensor, float]:
    """What refining a small block came to, down_proj as it began, which lies off on one side, and its loss then."""
    config = small_config(2)
    tensors = random_block(config)
    block = DecoderBlock.from_weights(config, tensors)
    solved = {name: round_to_nearest(tensors[f"{name}.weight"], 4, 32, True) for name in LINEARS}
    streams = Streams(config, torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0)))
    rotary = (streams.cos, streams.sin)
    targets = block(streams.hidden, *rotary)
    down = solved["mlp.down_proj"]
    codes = (down.codes.int() + by).clamp(0, 15).to(torch.uint8)
    scales = (down.scales.float() * stretch).to(torch.bfloat16).to(torch.float16)
    begun = {**solved, "mlp.down_proj": QuantizedTensor(codes, scales, down.zeros, 4, 32)}
    weights = {name: weight.dequantize() for name, weight in begun.items()}
    found = refine(block, weights, begun, streams.hidden, targets, rotary, steps=steps, seed=0)
    exact = DecoderBlock.from_weights(config, tensors | {f"{n}.weight": w for n, w in weights.items()})
    output = exact(streams.hidden, *rotary).double()
    wrong = ((output - targets).square().sum(-1) / targets.double().square().sum(-1)).mean().item()
    return found, begun["mlp.down_proj"], wrong


def test_codes_and_scales_go_no_further_than_they_may() -> None:
    """Of a linear whose codes are all 3 too high, or whose scales are all twice as large, pushed one way all the time:
    a code goes about one step, a scale about a fifth; within a few steps no code goes as far as to flip."""
    found, begun, wrong = pushed(60, by=3)
    assert found.before == pytest.approx(wrong, rel=1e-4)  # over all three samples
    assert found.after < found.before
    moved = (found.weights["mlp.down_proj"].codes.int() - begun.codes.int()).abs()
    assert moved.max() == 1 and moved.float().mean() > 0.1
    found, begun, _ = pushed(60, stretch=2.0)
    change = found.weights["mlp.down_proj"].scales.float() / begun.scales.float()
    assert 0.75 < change.min() < 0.9 and 0.78 < change.median() < 0.95
    found, begun, _ = pushed(12, by=3)
    assert torch.equal(found.weights["mlp.down_proj"].codes, begun.codes)


def test_what_is_told_has_four_digits() -> None:
    assert Refined({}, {}, 0.123456, 2.0).note == {"loss_before": 0.1235, "loss_after": 2.0}
