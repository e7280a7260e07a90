"""Balance: the same function to the last bit, nearer channels, through every step of quantizing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bluelm.block import block_of
from bluelm.checkpoint import Checkpoint
from bluelm.model import Decoder, DecoderBlock
from calibration.samples import load_samples
from calibration.walk import Moments
from compress.engine import quantize
from compress.methods.balance import Balance, divided
from compress.methods.rtn import round_to_nearest
from compress.recipe import Recipe
from tests.support.checkpoints.blocks import random_block, small_config
from tests.support.checkpoints.shapes import write_checkpoint


@pytest.mark.parametrize(("stage", "kv_heads"), [("gated", 2), ("mixed", 1), ("mixed", 2), ("mixed", 4)])
def test_a_balanced_block_is_the_same_to_the_last_bit(stage: str, kv_heads: int) -> None:
    config = small_config(kv_heads)
    tensors = random_block(config)
    move = next(move for move in block_of(config).moves if move.stage.name == stage)
    columns = len(move.channels)
    x = torch.randn(200, columns, generator=torch.Generator().manual_seed(1))
    loud = torch.tensor(move.channels) % 5 == 0
    x[:, loud] *= 100
    before = round_to_nearest(tensors[f"{move.before}.weight"], 8, -1, True)
    hessian = x.T @ x / len(x)
    balance = Balance.of(hessian, move, before)
    assert torch.equal(balance.rows, 2.0 ** balance.rows.log2().round())
    seen = x / balance.columns
    rms = seen.square().mean(0).sqrt()
    assert 5 < rms[loud].mean() / rms[~loud].mean() < 20, "the root of 100"
    torch.testing.assert_close(balance.moments(Moments(hessian)).hessian, seen.T @ seen / len(x))

    rounded = divided(before, balance.rows)
    assert torch.equal(rounded.codes, before.codes)
    assert torch.equal(rounded.dequantize() * balance.rows.unsqueeze(1), before.dequantize())
    tensors[f"{move.before}.weight"] = before.dequantize()
    plain = DecoderBlock.from_weights(config, tensors)
    balanced = DecoderBlock.from_weights(config, balance.tensors(tensors))
    stream = torch.randn(1, 9, config.hidden_size)
    angles = torch.rand(9, config.head_dim)
    assert torch.equal(plain(stream, angles.cos(), angles.sin()), balanced(stream, angles.cos(), angles.sin()))


def test_scales_that_cannot_be_divided_exactly_stay() -> None:
    config = small_config(2)
    move = next(move for move in block_of(config).moves if move.stage.name == "gated")
    x = torch.ones(4, len(move.channels))
    x[:, 0] = 1000
    before = round_to_nearest(random_block(config)[f"{move.before}.weight"], 8, -1, True)
    small = replace(before, scales=(before.scales * 0 + 6.1e-5).to(torch.float16))  # next to the subnormal numbers
    assert Balance.of(x.T @ x, move, before).rows[0] > 1
    assert Balance.of(x.T @ x, move, small).rows[0] == 1
    dead = torch.zeros(len(move.channels), len(move.channels))
    assert torch.equal(Balance.of(dead, move, before).rows, torch.ones(before.shape[0]))


@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_quantized_with_balance(refine: int, bias: bool, tmp_path: Path) -> None:
    """The quantized model is the float one's function; what reads loud channels no longer does; a second run that
    goes on from its blocks gives the same bytes."""
    architecture = "Qwen2ForCausalLM" if bias else "BlueLMForCausalLM"
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model", layers=2, architecture=architecture))
    samples = load_samples(None, checkpoint.tokenizer(), 8, 32, 0)
    common = {"bits": 8, "samples": 8, "length": 32, "refine": refine}
    found = {}
    for balance in (False, True):
        recipe = Recipe.make({**common, "balance": balance})
        found[balance] = quantize(checkpoint, samples, recipe, tmp_path / f"q{balance}")
    exact = Decoder.from_weights(checkpoint)(samples.tokens[:2])
    plain, balanced = (Decoder.from_weights(found[kind])(samples.tokens[:2]) for kind in (False, True))
    lost = [float((exact - one).square().mean() / exact.square().mean()) for one in (plain, balanced)]
    assert lost[1] < 1.5 * lost[0] + 1e-6
    name = "model.layers.0.mlp.up_proj"
    ratio = (found[True].linear(name).scales / found[False].linear(name).scales).float()
    assert ratio.min() < 1 < ratio.max() or refine
    if not refine:
        assert torch.equal(found[True].linear(name).codes, found[False].linear(name).codes)
        assert torch.equal(ratio, 2.0 ** ratio.log2().round())
    assert found[True].info["layers"]["model.layers.0.mlp.down_proj"]["balanced"] > 1
