"""A tiny BlueLM checkpoint with the demo model's tokenizer: random weights, seconds for the whole way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bluelm.system.files import demo_checkpoint

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, ROWS = 64, 128, 2, 2, 1, 6144


def tiny_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors by name, all that config.json of `tiny_checkpoint` asks for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    narrow = HIDDEN // HEADS * KV_HEADS
    tensors = {
        "model.embed_tokens.weight": draw(ROWS, HIDDEN),
        "model.embed_layer_norm.weight": torch.ones(HIDDEN),
        "model.embed_layer_norm.bias": draw(HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": 3 * draw(ROWS, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (narrow, HIDDEN),
            "self_attn.v_proj": (narrow, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            tensors[f"{prefix}.{name}.weight"] = draw(*shape)
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(HIDDEN)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(HIDDEN)
    return tensors


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint into a new folder and return it."""
    folder.mkdir(parents=True)
    config = json.loads((demo_checkpoint() / "config.json").read_text())
    config |= {
        "vocab_size": ROWS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tiny_tensors(seed), folder / "model.safetensors")
    shutil.copy(demo_checkpoint() / "tokenizer.model", folder)
    return folder
