"""The walk: what it collects against float64 definitions, and that it ends where the block ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bluelm.block import block_of
from bluelm.checkpoint import Checkpoint
from bluelm.model import DecoderBlock
from bluelm.system.files import demo_checkpoint
from calibration import walk
from calibration.samples import load_samples
from calibration.walk import Hessian, Streams, collect_hessians, moments_in_order


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


@pytest.fixture(scope="module")
def hidden(checkpoint: Checkpoint) -> Tensor:
    tokens = load_samples(None, checkpoint.tokenizer(), 5, 48, 0).tokens
    return checkpoint.embedding()[tokens]


def rough(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with an error, as quantizing makes one."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 2
        else tensor
        for name, tensor in tensors.items()
    }


def read_by(block: DecoderBlock, x: Tensor, streams: Streams) -> dict[str, Tensor]:
    """What each linear of a block reads, [tokens, in] float64, taken down by hooks on a plain forward."""
    found: dict[str, Tensor] = {}

    def take(name: str):
        return lambda _, inputs: found.__setitem__(name, inputs[0].flatten(0, -2).double())

    names = [name for stage in streams.block.stages for name in stage.linears]
    hooks = [block.get_submodule(name).register_forward_pre_hook(take(name)) for name in names]
    block(x, streams.cos, streams.sin)
    for hook in hooks:
        hook.remove()
    return found


def test_hessian_is_the_mean_of_outer_products() -> None:
    x = torch.randn(7, 3, 300, generator=torch.Generator().manual_seed(0))
    hessian = Hessian()
    for part in x.split(2):
        hessian.add(part)
    flat = x.flatten(0, 1).double()
    found = hessian.mean()
    torch.testing.assert_close(found.double(), flat.T @ flat / 21, rtol=0, atol=1e-6)
    assert torch.equal(found, found.T)
    assert torch.linalg.eigvalsh(found.double()).min() > -1e-5


def test_collected_hessians_are_those_of_a_plain_forward(checkpoint: Checkpoint, hidden: Tensor) -> None:
    block = DecoderBlock.from_weights(checkpoint.config, checkpoint.block(0))
    streams = Streams(checkpoint.config, hidden.clone())
    found = collect_hessians(streams, block)
    read = read_by(block, hidden, streams)
    for stage in streams.block.stages:
        x = read[stage.linears[0]]
        torch.testing.assert_close(found[stage.name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert torch.equal(streams.hidden, hidden)


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_stages_see_the_quantized_weights_before_them(
    checkpoint: Checkpoint, hidden: Tensor, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "BATCH_TOKENS", 96)
    monkeypatch.setattr(walk, "KEPT_BYTES", kept_bytes)
    tensors = checkpoint.block(1)
    final = rough(tensors)
    streams = Streams(checkpoint.config, hidden.clone(), hidden.clone())
    exact = DecoderBlock.from_weights(checkpoint.config, tensors)
    block = DecoderBlock.from_weights(checkpoint.config, tensors)
    read = read_by(DecoderBlock.from_weights(checkpoint.config, final), hidden, streams)
    order = []
    for stage, moments in moments_in_order(streams, block, exact):
        order.append(stage)
        x = read[stage.linears[0]]
        torch.testing.assert_close(moments.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        for name in stage.linears:
            block.get_submodule(name).weight = nn.Parameter(final[f"{name}.weight"], requires_grad=False)
    assert tuple(order) == block_of(checkpoint.config).stages

    plain = Streams(checkpoint.config, hidden.clone(), hidden.clone())
    plain.advance(block, exact)
    assert torch.equal(streams.hidden, plain.hidden)  # to the bit: a resumed run must go on from the same states
    assert streams.exact is not None
    assert plain.exact is not None
    assert torch.equal(streams.exact, plain.exact)


def test_cross_moment_is_what_the_linear_should_add(checkpoint: Checkpoint, hidden: Tensor) -> None:
    tensors = checkpoint.block(0)
    drifted = hidden + 0.01 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    streams = Streams(checkpoint.config, drifted.clone(), hidden.clone())
    exact, block = (DecoderBlock.from_weights(checkpoint.config, tensors) for _ in range(2))
    goal = hidden + exact.self_attn(exact.input_layernorm(hidden), streams.cos, streams.sin)
    x = block.self_attn.mix(block.input_layernorm(drifted), streams.cos, streams.sin).flatten(0, 1).double()
    y = (goal - drifted).flatten(0, 1).double()
    found = {stage.name: moments.cross for stage, moments in moments_in_order(streams, block, exact)}
    assert found["attention_norm"] is None
    assert found["mlp_norm"] is None
    assert found["mixed"] is not None
    torch.testing.assert_close(found["mixed"].double(), y.T @ x / len(x), rtol=1e-4, atol=1e-7)
    assert found["gated"] is not None
    assert found["gated"].shape == (checkpoint.config.hidden_size, checkpoint.config.intermediate_size)


def test_one_stream_asks_for_no_cross_moment(checkpoint: Checkpoint, hidden: Tensor) -> None:
    block = DecoderBlock.from_weights(checkpoint.config, checkpoint.block(0))
    streams = Streams(checkpoint.config, hidden.clone())
    assert all(moments.cross is None for _, moments in moments_in_order(streams, block, block))
