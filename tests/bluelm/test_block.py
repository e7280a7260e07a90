"""The description of a block against the reference, which is written apart: shapes, values, what follows from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bluelm.block import STREAM, Add, Attend, Block, Linear, Move, Norm, Silu, Step, block_of
from bluelm.config import ModelConfig
from bluelm.model import DecoderBlock
from bluelm.rope import rope_table
from calibration.steps import Parameters, outcomes
from tests.support.checkpoints.shapes import LINEARS, config_dict

FAMILIES: dict[str, dict[str, Any]] = {
    "bluelm": {},
    "llama, one key head": {"architecture": "LlamaForCausalLM", "layer_norm": False, "kv_heads": 1},
    "llama, all key heads": {"architecture": "LlamaForCausalLM", "layer_norm": False, "kv_heads": None},
    "llama, wide heads": {"architecture": "LlamaForCausalLM", "layer_norm": False, "head_dim": 32},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "layer_norm": False},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "layer_norm": False, "head_dim": 32},
}


def config_of(family: str) -> ModelConfig:
    return ModelConfig.from_dict(config_dict(**FAMILIES[family]))


def random_tensors(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {name: tensor.shape for name, tensor in DecoderBlock(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_the_reference(family: str) -> None:
    config = config_of(family)
    with torch.device("meta"):
        reference = DecoderBlock(config).state_dict()
    assert dict(block_of(config).shapes) == {name: tuple(tensor.shape) for name, tensor in reference.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_values_are_those_of_the_reference(family: str) -> None:
    """What each linear reads and gives, and each norm, to the bit; hooks on the reference tell."""
    config = config_of(family)
    described, tensors = block_of(config), random_tensors(config)
    reference = DecoderBlock.from_weights(config, tensors)
    cos, sin = rope_table(config, 9)
    x = torch.randn(2, 9, config.hidden_size, generator=torch.Generator().manual_seed(5))
    found = {STREAM: x, **dict(outcomes(described.steps, {STREAM: x}, Parameters(tensors.__getitem__, cos, sin, 1e-6)))}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def take(name: str) -> Any:
        return lambda _, inputs, output: seen.update({name: (inputs[0], output)})

    for name in (*described.linears, *described.norms):
        reference.get_submodule(name).register_forward_hook(take(name))
    assert torch.equal(found["output"], reference(x, cos, sin))
    for name, step in {**described.linears, **described.norms}.items():
        read, given = (x.transpose(1, 2) if x.ndim == 4 else x for x in seen[name])  # heads before tokens there
        assert torch.equal(found[step.reads].flatten(), read.flatten()), name
        assert torch.equal(found[step.makes].flatten(), given.flatten()), name


def test_what_follows_for_a_plain_block() -> None:
    block = block_of(config_of("qwen2"))
    assert tuple(block.linears) == LINEARS
    assert [stage.linears for stage in block.stages] == [LINEARS[:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:]]
    assert [(branch.begins, branch.writer.weight, branch.mixes) for branch in block.branches] == [
        (STREAM, "self_attn.o_proj", True),
        ("attention_residual", "mlp.down_proj", False),
    ]
    assert block.stream == (STREAM, "attention_residual", "output")
    assert block.turned == {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    assert block.weights == sum(rows * columns for rows, columns in (s for s in block.shapes.values() if len(s) == 2))
    assert {name: block.factors(name) for name in LINEARS if block.factors(name)} == {LINEARS[6]: LINEARS[4:6]}
    assert block.vector_size == 2 * 64 + 64 + 2 * 32
    assert [move.before for move in block.moves] == [
        "input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj",
    ]  # fmt: skip


def changed(block: Block, value: str, *steps: Step) -> Block:
    """The block with other steps in the place of the one that makes a value."""
    place = [step.makes for step in block.steps].index(value)
    return Block((*block.steps[:place], *steps, *block.steps[place + 1 :]))


def moves(block: Block) -> dict[str, Move]:
    return {move.stage.name: move for move in block.moves}


def test_scales_move_only_where_they_can_be_taken_back() -> None:
    """Values that are normalised, or read twice, take no scale."""
    block = block_of(config_of("bluelm"))
    attend = block.attention
    normed = replace(attend, values="v_norm")
    assert "mixed" not in moves(changed(block, "mixed", Norm("v_norm", "v", "self_attn.v_norm", 16), normed))
    assert "mixed" not in moves(changed(block, "mixed", replace(attend, keys="v")))
    gelu = Silu("gated", "gate_silu")  # nothing behind it is linear in what comes before
    assert "gated" not in moves(changed(block, "gated", gelu))


@pytest.mark.parametrize(
    ("value", "steps", "told"),
    [
        ("up", [Linear("gate", "mlp_norm", "mlp.up_proj", 96, 64)], "twice"),
        ("up", [Linear("up", "nothing", "mlp.up_proj", 96, 64)], "not there yet"),
        ("up", [Linear("up", "attended", "mlp.up_proj", 96, 64)], "another branch"),
        ("output", [], "last step"),
        ("output", [Add("output", STREAM, "down")], "must be the stream"),
        ("output", [Silu("acted", "down"), Add("output", "attention_residual", "acted")], "must be the stream"),
        ("mixed", [Attend("mixed", "q", "k", "v", 4, 2, 16), Silu("q_again", "mixed")], "alone must read"),
    ],
)
def test_steps_that_hang_together_otherwise_are_refused(value: str, steps: list[Step], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        changed(block_of(config_of("bluelm")), value, *steps)
