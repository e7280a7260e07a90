"""Random blocks without a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bluelm.block import block_of
from bluelm.config import ModelConfig


def small_config(kv_heads: int, architecture: str = "LlamaForCausalLM") -> ModelConfig:
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
    }
    return ModelConfig.from_dict(fields)


def random_block(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 1 + 0.1 * torch.randn(shape, generator=generator)
        if name.endswith("layernorm.weight")
        else torch.randn(shape, generator=generator) / 8
        for name, shape in block_of(config).shapes.items()
    }
