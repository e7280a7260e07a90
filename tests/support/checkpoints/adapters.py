"""Small LoRA adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (64, 64), DOWN: (64, 96)}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "bias": "none"}


def write_adapter(
    folder: Path, *, seed: int = 0, tensors: dict[str, Tensor] | None = None, **config: Any
) -> dict[str, Tensor]:
    """A PEFT folder that changes q of block 0 and down of block 1; its tensors."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    made: dict[str, Tensor] = {}
    for module, (rows, columns) in SHAPES.items():
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 10
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 10
    made |= tensors or {}
    save_file(made, folder / "adapter_model.safetensors")
    return made
