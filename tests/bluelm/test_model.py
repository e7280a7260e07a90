"""The decoder against transformers' Llama, and its cached path against the full one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.model import Decoder, DecoderBlock, KVCache
from bluelm.rope import rope_table
from bluelm.system.files import demo_checkpoint
from tests.support.checkpoints.shapes import write_checkpoint

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
NTKMIXED = {"type": "ntkmixed", "factor": 16.0, "power": 0.3}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": None},
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "plain embedding": {"layer_norm": False},
    "llama": {"architecture": "LlamaForCausalLM", "layer_norm": False},
    "tied": {"tied": True, "layer_norm": False},
    "tied under a layer norm": {"tied": True},
    "wide heads": {"head_dim": 32},
    "theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "eps": {"rms_norm_eps": 1e-3},
}


def tokens(length: int, batch: int = 2, rows: int = 512) -> Tensor:
    return torch.randint(rows, (batch, length), generator=torch.Generator().manual_seed(5))


def transformers_logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Logits of transformers' Llama with the checkpoint's tensors; torch's LayerNorm folds the table."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, scaling = checkpoint.config, checkpoint.config.rope_scaling
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {name: value for name, value in vars(scaling).items() if value is not None and name != "kind"}
        rope["rope_type"] = scaling.kind
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=rope,
            **eager,
        )
    ).eval()
    state = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    embed = state["model.embed_tokens.weight"]
    state.setdefault("lm_head.weight", embed)
    if config.embedding_layer_norm:
        norm = torch.nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        norm.weight.data = state.pop("model.embed_layer_norm.weight")
        norm.bias.data = state.pop("model.embed_layer_norm.bias")
        state["model.embed_tokens.weight"] = norm(embed).detach()
    llama.load_state_dict(state)
    with torch.inference_mode():
        return llama(ids).logits


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tokenizer=False, **SHAPES[name]))
    decoder = Decoder.from_weights(checkpoint)
    for length in (1, 40, 200):  # 200 is beyond max_position_embeddings: dynamic rope changes there
        got, want = decoder(tokens(length)), transformers_logits(checkpoint, tokens(length))
        assert want.std() > 0.3  # the models are not dead
        assert (got - want).abs().max() < 1e-4


def test_demo_logits_are_those_of_transformers() -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    ids = tokens(64, rows=6144)
    difference = Decoder.from_weights(checkpoint)(ids) - transformers_logits(checkpoint, ids)
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("name", [*SHAPES, "ntkmixed"])
def test_cached_path_is_the_full_path(tmp_path: Path, name: str) -> None:
    shape = SHAPES.get(name, {"rope_scaling": NTKMIXED})
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tokenizer=False, **shape))
    decoder = Decoder.from_weights(checkpoint)
    ids = tokens(60)
    cache = KVCache(checkpoint.config, capacity=60, batch=2)
    for _ in range(2):  # a second time after a reset
        cache.reset()
        pieces = [decoder(ids[:, a:b], cache) for a, b in ((0, 32), (32, 33), (33, 50), (50, 51), (51, 60))]
        assert (torch.cat(pieces, 1) - decoder(ids)).abs().max() < 2e-5
        assert cache.length == 60


def test_dynamic_cache_turns_by_its_capacity(tmp_path: Path) -> None:
    shape = SHAPES["dynamic"]
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tokenizer=False, **shape))
    decoder = Decoder.from_weights(checkpoint)
    ids = tokens(200)
    cache = KVCache(checkpoint.config, capacity=200, batch=2)
    got = torch.cat([decoder(ids[:, :90], cache), decoder(ids[:, 90:], cache)], 1)
    assert (got - decoder(ids)).abs().max() < 2e-5  # the full pass knows that there are 200


def test_full_cache_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tokenizer=False))
    decoder, cache = Decoder.from_weights(checkpoint), KVCache(checkpoint.config, capacity=10)
    decoder(tokens(8, batch=1), cache)
    with pytest.raises(ValueError, match="holds 10 tokens, 12 are needed"):
        decoder(tokens(4, batch=1), cache)
    assert cache.length == 8


def test_later_tokens_do_not_change_earlier_logits(tmp_path: Path) -> None:
    decoder = Decoder.from_weights(Checkpoint.open(write_checkpoint(tmp_path, tokenizer=False)))
    ids = tokens(30)
    changed = ids.clone()
    changed[:, 20:] = 7
    assert torch.equal(decoder(ids)[:, :20], decoder(changed)[:, :20])


def test_blocks_one_at_a_time_are_the_decoder(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tokenizer=False))
    ids = tokens(20)
    cos, sin = rope_table(checkpoint.config, 20)
    x = checkpoint.embedding()[ids]
    for index in range(checkpoint.config.num_layers):
        x = DecoderBlock.from_weights(checkpoint.config, checkpoint.block(index))(x, cos, sin)
    logits = torch.nn.functional.rms_norm(x, (64,), checkpoint.final_norm(), 1e-6) @ checkpoint.head().T
    assert (logits - Decoder.from_weights(checkpoint)(ids)).abs().max() < 1e-5


def test_decoder_keeps_no_gradients(tmp_path: Path) -> None:
    decoder = Decoder.from_weights(Checkpoint.open(write_checkpoint(tmp_path, tokenizer=False)))
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert not decoder(tokens(4)).requires_grad
