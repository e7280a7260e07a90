"""Rotations: the same function to the last bits of float32, for every shape; outliers are spread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bluelm.block import block_of
from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.model import Decoder, DecoderBlock
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from compress.cost import finished_size
from compress.engine import quantize
from compress.fit import check
from compress.methods.rotate import Rotated, Rotation, cosines, rotate_block
from compress.methods.rtn import round_to_nearest
from compress.recipe import Recipe
from tests.support.checkpoints.shapes import shortened, write_checkpoint


@pytest.mark.parametrize("width", [1, 2, 12, 64, 80, 96, 320])
def test_rotation_is_orthogonal_and_turns_both_sides(width: int) -> None:
    rotation = Rotation.of(width, 3)
    matrix = rotation(torch.eye(width))  # R itself
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), atol=1e-5, rtol=0)
    weight = torch.randn(width, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.rows(weight), matrix.T @ weight, atol=1e-5, rtol=1e-5)
    spread = matrix.abs().max().item() * width**0.5
    assert spread < 1.5, "every output takes about as much of every input"
    assert not torch.equal(Rotation.of(96, 1).signs, Rotation.of(96, 2).signs)


def test_cosines_are_orthogonal() -> None:
    for size in (1, 3, 5, 7, 43):
        table = cosines(size)
        torch.testing.assert_close(table.T @ table, torch.eye(size, dtype=torch.float64))


def random_block(config: ModelConfig) -> dict[str, Tensor]:
    """Random tensors of a block, norms and biases too."""
    torch.manual_seed(0)
    return {name: torch.randn(value.shape) * 0.2 + 0.1 for name, value in DecoderBlock(config).state_dict().items()}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_turned_block_turns_its_stream(kv_heads: int, bias: bool) -> None:
    demo = Checkpoint.open(demo_checkpoint()).config
    config = replace(
        demo, hidden_size=96, intermediate_size=64, num_heads=4, num_kv_heads=kv_heads, head_dim=24, qkv_bias=bias
    )
    tensors = random_block(config)
    stream, values = Rotation.of(96, 0), Rotation.of(24, 1)
    x, angles = torch.randn(2, 7, 96), torch.rand(7, 12)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    plain = DecoderBlock.from_weights(config, tensors)(x, cos, sin)
    rotated = rotate_block(block_of(config), tensors, stream, values)
    turned = DecoderBlock.from_weights(config, rotated)(stream(x), cos, sin)
    torch.testing.assert_close(turned, stream(plain), atol=2e-5, rtol=1e-5)


def test_the_turned_demo_model_is_the_demo_model() -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    tokens = load_samples(None, checkpoint.tokenizer(), 1, 64, 0).tokens
    rotated = Rotated(checkpoint)
    plain, turned = (Decoder.from_weights(weights)(tokens) for weights in (checkpoint, rotated))
    assert (plain - turned).abs().max() < 1e-4 * plain.abs().max()
    assert torch.equal(rotated.block(0)["input_layernorm.weight"], torch.ones(256))
    assert (len(rotated.stream.signs), len(rotated.values.signs)) == (256, checkpoint.config.head_dim)
    assert (rotated.folder, rotated.digest()) == (checkpoint.folder, checkpoint.digest())
    assert rotated.tensors == checkpoint.tensors and rotated.config == checkpoint.config
    other = Rotated(checkpoint, seed=1)
    assert not torch.equal(other.stream.signs, rotated.stream.signs)


def test_outliers_of_the_stream_are_spread() -> None:
    config = Checkpoint.open(demo_checkpoint()).config
    tensors = random_block(config)
    tensors["input_layernorm.weight"][[3, 70]] *= 50  # such columns make every group's scale coarse

    def lost(block: dict[str, Tensor]) -> float:
        weight = block["self_attn.q_proj.weight"] * block["input_layernorm.weight"]
        error = round_to_nearest(weight, 4, 32, True).dequantize() - weight
        return float(error.square().mean())

    assert lost(rotate_block(block_of(config), tensors, Rotation.of(256, 0), Rotation.of(32, 1))) < 0.5 * lost(tensors)


def test_quantizing_turned_weights(tmp_path: Path) -> None:
    """The quantized checkpoint is a plain one: nothing at run time knows of the rotation."""
    checkpoint = Checkpoint.open(shortened(demo_checkpoint(), 1, tmp_path / "short"))
    samples = load_samples(None, checkpoint.tokenizer(), 8, 64, 0)
    quantized = quantize(checkpoint, samples, Recipe.make({"bits": 8, "rotate": True}), tmp_path / "q")
    plain, turned = (Decoder.from_weights(weights)(samples.tokens[:1]) for weights in (checkpoint, quantized))
    assert (plain - turned).square().mean() < 1e-3 * plain.square().mean()
    weight = quantized.linear("model.layers.0.self_attn.q_proj").dequantize()
    expected = Rotated(checkpoint).block(0)["self_attn.q_proj.weight"]
    assert (weight - expected).square().mean() < 1e-4 * expected.square().mean()


def test_a_shared_table_is_parted(tmp_path: Path) -> None:
    """The last norm's weight has to be in the head, and cannot be in the embedding."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "tied", layers=1, tied=True, layer_norm=False))
    assert checkpoint.config.shares_table
    recipe = Recipe.make({"method": "rtn", "bits": 8, "rotate": True})
    quantized = quantize(checkpoint, None, recipe, tmp_path / "q")
    assert not quantized.config.shares_table and not ModelConfig.from_folder(quantized.folder).shares_table
    tokens = torch.arange(24).view(1, -1)
    plain, turned, rounded = (Decoder.from_weights(w)(tokens) for w in (checkpoint, Rotated(checkpoint), quantized))
    assert (plain - turned).abs().max() < 1e-4 * plain.abs().max()
    assert (plain - rounded).square().mean() < 1e-3 * plain.square().mean()
    size = sum(file.stat().st_size for file in quantized.folder.glob("*.safetensors"))
    assert abs(size / finished_size(quantized.config, recipe) - 1) < 0.1
    check(checkpoint.config, recipe.model_copy(update={"head_group_size": 32}))  # widths of its own
