"""Small random checkpoints of other families, as transformers or their authors define them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROWS, WIDTH, INNER, LAYERS, HEADS, KV, SIZE = 96, 64, 96, 2, 4, 2, 16


COMMON = {
    "vocab_size": ROWS, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def randomised(model: Any) -> Any:
    """A transformers model with every parameter random, norms and biases too."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in name else noise * 0.2
    return model.eval()


def chatglm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers GLM checkpoint under ChatGLM3's names: q, k and v fused, as THUDM's files have them."""
    renamed = {
        "transformer.embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": tensors["model.norm.weight"],
        "transformer.output_layer.weight": tensors["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.ones(SIZE // 4),
    }
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}", f"transformer.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{old}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            renamed[f"{new}.self_attention.query_key_value.{kind}"] = torch.cat(parts)
        for theirs, ours in {
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.gate_up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        }.items():
            renamed[f"{new}.{ours}.weight"] = tensors[f"{old}.{theirs}.weight"]
    return renamed


CHATGLM = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "padded_vocab_size": ROWS,
    "hidden_size": WIDTH, "ffn_hidden_size": INNER, "num_layers": LAYERS, "num_attention_heads": HEADS,
    "multi_query_attention": True, "multi_query_group_num": KV, "kv_channels": SIZE, "seq_length": 64,
    "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True,
    "post_layer_norm": True, "original_rope": True, "eos_token_id": 2, "pad_token_id": 0,
    "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": False,
}  # fmt: skip


BAICHUAN = {
    **COMMON, "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "vocab_size": 125696,
    "num_key_value_heads": None, "z_loss_weight": 0, "tie_word_embeddings": False,
}  # fmt: skip


def baichuan_tensors(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(5)
    tensors = {
        "model.embed_tokens.weight": torch.randn(rows, WIDTH) * 0.3,
        "model.norm.weight": 1 + 0.2 * torch.randn(WIDTH),
        "lm_head.weight": torch.randn(rows, WIDTH),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": 1 + 0.2 * torch.randn(WIDTH),
            f"{at}.post_attention_layernorm.weight": 1 + 0.2 * torch.randn(WIDTH),
            f"{at}.self_attn.W_pack.weight": torch.randn(3 * WIDTH, WIDTH) * 0.2,
            f"{at}.self_attn.o_proj.weight": torch.randn(WIDTH, WIDTH) * 0.2,
            f"{at}.mlp.gate_proj.weight": torch.randn(INNER, WIDTH) * 0.2,
            f"{at}.mlp.up_proj.weight": torch.randn(INNER, WIDTH) * 0.2,
            f"{at}.mlp.down_proj.weight": torch.randn(WIDTH, INNER) * 0.2,
        }
    return tensors


def llama(folder: Path) -> Path:
    import transformers

    randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))).save_pretrained(folder)
    return folder


def qwen2(folder: Path, rows: int = ROWS) -> Path:
    import transformers

    values: dict[str, Any] = {**COMMON, "vocab_size": rows}
    config = transformers.Qwen2Config(**values, tie_word_embeddings=True)
    randomised(transformers.Qwen2ForCausalLM(config)).save_pretrained(folder)
    return folder


def qwen3(folder: Path) -> Path:
    import transformers

    config = transformers.Qwen3Config(**COMMON, head_dim=32)
    randomised(transformers.Qwen3ForCausalLM(config)).save_pretrained(folder)
    return folder


def baichuan(folder: Path) -> Path:
    return write(folder, {**BAICHUAN, "vocab_size": ROWS}, baichuan_tensors(ROWS))


def glm(folder: Path) -> Path:
    import transformers

    config = transformers.GlmConfig(**COMMON, head_dim=16, attention_bias=True, pad_token_id=0, eos_token_id=2)
    return write(folder, CHATGLM, chatglm(dict(randomised(transformers.GlmForCausalLM(config)).state_dict())))
