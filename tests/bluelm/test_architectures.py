"""Each architecture of the table: logits against transformers, or against the formula of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bluelm.architectures import ARCHITECTURES
from bluelm.checkpoint import Checkpoint, file_shapes
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.model import Decoder
from bluelm.rope import max_context, rope_table
from compress.engine import quantize
from compress.recipe import Recipe
from tests.support.checkpoints.families import (
    BAICHUAN,
    CHATGLM,
    COMMON,
    HEADS,
    INNER,
    LAYERS,
    ROWS,
    SIZE,
    WIDTH,
    baichuan_tensors,
    chatglm,
    randomised,
    write,
)

TOKENS = torch.arange(5, 85, 2).view(2, 20)


def assert_logits(folder: Path, want: Tensor) -> None:
    checkpoint = Checkpoint.open(folder)
    got = Decoder.from_weights(checkpoint)(TOKENS)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "rope_theta": 500000.0}),
        (
            "Llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("Qwen2", {"rope_theta": 1000000.0}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 32}),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1000000.0}),
    ],
)  # fmt: skip
def test_llama_and_qwen_are_transformers(tmp_path: Path, kind: str, extra: dict[str, Any]) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**COMMON, **extra)
    model = randomised(getattr(transformers, f"{kind}ForCausalLM")(config))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_logits(tmp_path, model(TOKENS).logits)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0},
         "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 300.0}, "rope_theta": 55.0,
         "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}},
        {"rope_scaling": {}, "rope_theta": 55.0, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_theta": 55.0, "rope_parameters": {"rope_type": "default"}},
    ],
)  # fmt: skip
def test_rope_scaling_beside_rope_parameters(tmp_path: Path, rope: dict[str, Any]) -> None:
    import transformers

    model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **rope}))
    with torch.no_grad():
        assert_logits(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_a_trained_head_beside_a_tied_table_is_read_as_transformers_reads_it(tmp_path: Path, kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**COMMON, tie_word_embeddings=False)
    randomised(getattr(transformers, f"{kind}ForCausalLM")(config)).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits
    assert_logits(tmp_path, want)
    assert "tie_word_embeddings" in Checkpoint.open(tmp_path).warnings[0]
    codes = quantize(Checkpoint.open(tmp_path), None, Recipe.make({"method": "rtn", "bits": 8}), tmp_path / "codes")
    got = Decoder.from_weights(codes)(TOKENS)
    assert (got - want).abs().mean() < 0.05 * want.abs().mean(), "the head was dropped"


def test_chatglm3_is_transformers_glm_under_other_names(tmp_path: Path) -> None:
    """GLM in transformers is the same arithmetic: neighbouring pairs turn, in half of each head."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = transformers.GlmConfig(
        **COMMON, head_dim=SIZE, rope_parameters=rope, attention_bias=True, pad_token_id=0, eos_token_id=2
    )
    model = randomised(transformers.GlmForCausalLM(config))
    write(tmp_path, CHATGLM, chatglm(dict(model.state_dict())))
    with torch.no_grad():
        assert_logits(tmp_path, model(TOKENS).logits)


@pytest.mark.parametrize("name", ["THUDM/chatglm3-6b-32k", "glm-4-9b-chat"])
def test_chatglm3_multiplies_its_ropes_base(name: str) -> None:
    config = ModelConfig.from_dict({**CHATGLM, "rope_ratio": 50, "_name_or_path": name})
    assert (config.rope_theta, config.rope_scaling) == (500000.0, None)
    large = ModelConfig.from_dict({**CHATGLM, "rope_ratio": 50, "padded_vocab_size": 151552})
    assert large.rope_theta == 500000.0


def test_chatglm2_divides_positions() -> None:
    """modeling_chatglm.py of ChatGLM2-6B-32K: angles of position p are those of p / rope_ratio."""
    long = {"rope_ratio": 16, "seq_length": 32768, "_name_or_path": "THUDM/chatglm2-6b-32k"}
    config = ModelConfig.from_dict({**CHATGLM, **long})
    assert max_context(config) == 32768
    cos, _ = rope_table(config, 100)
    pairs = torch.arange(SIZE // 4, dtype=torch.float64)
    angles = torch.outer(torch.arange(100, dtype=torch.float64) / 16, 10000.0 ** (-4 * pairs / SIZE))
    torch.testing.assert_close(cos[:, : SIZE // 4].double(), angles.cos(), atol=1e-5, rtol=0)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_rope_ratio_of_a_model_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match="divides positions by 8 in ChatGLM2-32K, and makes") as caught:
        ModelConfig.from_dict({**CHATGLM, "rope_ratio": 8})
    for name in ("THUDM/chatglm2-6b-32k", "THUDM/chatglm3-6b-32k"):
        assert name in str(caught.value)
        ModelConfig.from_dict({**CHATGLM, "rope_ratio": 8, "_name_or_path": name})
    ModelConfig.from_dict({**CHATGLM, "rope_ratio": 1})
    assert ModelConfig.from_dict({**COMMON, "architectures": ["LlamaForCausalLM"], "rope_ratio": 8}).rope_theta == 1e4


def baichuan_logits(tensors: dict[str, Tensor], normalised: bool) -> Tensor:
    """The formula of modeling_baichuan.py (7B), in float64, one token after another."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    rows, count, size = TOKENS.shape[0], TOKENS.shape[1], WIDTH // HEADS

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + COMMON["rms_norm_eps"]).sqrt() * t[name]

    def turn(x: Tensor) -> Tensor:  # [B, T, H, D]: pairs (j, j + D/2) as complex numbers
        j = torch.arange(size // 2, dtype=torch.float64)
        angle = torch.outer(torch.arange(count, dtype=torch.float64), 10000.0 ** (-2 * j / size))
        turned = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * torch.polar(
            torch.ones_like(angle), angle
        ).unsqueeze(1)
        return torch.cat([turned.real, turned.imag], -1)

    x = t["model.embed_tokens.weight"][TOKENS]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        packed = norm(x, f"{at}.input_layernorm.weight") @ t[f"{at}.self_attn.W_pack.weight"].T
        q, k, v = packed.view(rows, count, 3, HEADS, size).unbind(2)
        q, k = turn(q), turn(k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5
        scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), float("-inf"))
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(rows, count, WIDTH)
        x = x + mixed @ t[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm.weight")
        gated = F.silu(y @ t[f"{at}.mlp.gate_proj.weight"].T) * (y @ t[f"{at}.mlp.up_proj.weight"].T)
        x = x + gated @ t[f"{at}.mlp.down_proj.weight"].T
    head = t["lm_head.weight"]
    head = head / head.norm(dim=1, keepdim=True) if normalised else head
    return (norm(x, "model.norm.weight") @ head.T).float()


@pytest.mark.parametrize(
    ("name", "rows"),
    [("BaichuanForCausalLM", 125696), ("BaichuanForCausalLM", 128), ("BaiChuanForCausalLM", ROWS)],
)
def test_baichuan_follows_its_formula(tmp_path: Path, name: str, rows: int) -> None:
    tensors = baichuan_tensors(rows)
    write(tmp_path, {**BAICHUAN, "architectures": [name], "vocab_size": rows}, tensors)
    assert_logits(tmp_path, baichuan_logits(tensors, normalised=name == "BaichuanForCausalLM"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"unknown architecture \['MistralForCausalLM'\]"),
        ({"max_position_embeddings": None}, "ALiBi is not supported"),
        ({"vocab_size": 64000}, "a vocabulary of 64000 is Baichuan 1's"),
        ({"architectures": ["BaiChuanForCausalLM"]}, "a vocabulary of 125696 is Baichuan 2's"),
        ({"architectures": None}, "model_type 'baichuan' alone says not which"),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type says 'baichuan'"),
        ({"model_type": "mistral"}, "architectures says BaichuanForCausalLM, model_type says 'mistral'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict({**BAICHUAN, **change})


def test_variants_of_a_known_architecture_are_refused_too() -> None:
    with pytest.raises(InputError, match="multi_query_attention is False; a chatglm model needs True"):
        ModelConfig.from_dict({**CHATGLM, "multi_query_attention": False})
    with pytest.raises(InputError, match="use_sliding_window is True"):
        ModelConfig.from_dict({**COMMON, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True})


def test_a_missing_fused_tensor_is_named_as_the_file_would_have_it(tmp_path: Path) -> None:
    tensors = baichuan_tensors(ROWS)
    del tensors["model.layers.1.self_attn.W_pack.weight"]
    write(tmp_path, {**BAICHUAN, "vocab_size": ROWS}, tensors)
    with pytest.raises(InputError, match=r"model.layers.1.self_attn.W_pack.weight is missing"):
        Checkpoint.open(tmp_path)


configs = st.sampled_from([
    *({**COMMON, "architectures": [name]} for name in ARCHITECTURES if name != "ChatGLMModel"), CHATGLM,
])  # fmt: skip


@given(configs, st.sampled_from([2, 4]), st.sampled_from([16, 32]))
@settings(max_examples=20)
def test_a_config_that_we_write_reads_back_the_same(data: dict[str, Any], heads: int, width: int) -> None:
    data = {**data, "num_attention_heads": heads, "hidden_size": heads * width, "kv_channels": width, "head_dim": width}
    config = ModelConfig.from_dict(data)
    assert ModelConfig.from_dict(config.to_dict()) == config
    shapes = file_shapes(config)
    rows = sum(shape[0] for name, shape in shapes.items() if ".layers.0." in name and len(shape) == 2)
    grouped = config.num_kv_heads * config.head_dim * 2
    assert rows == config.num_heads * config.head_dim + grouped + 2 * config.hidden_size + 2 * INNER
