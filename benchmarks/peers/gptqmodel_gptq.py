"""GPTQModel's GPTQ, its defaults."""

from __future__ import annotations

from typing import Any

import torch
from common import Task, serve


def quantize(task: Task, model: Any) -> dict[str, torch.Tensor]:
    from gptqmodel import GPTQModel, QuantizeConfig

    del model  # it loads the folder itself
    widths = {"bits": task.bits, "group_size": task.group_size, "sym": task.symmetric}
    config = QuantizeConfig(**widths, device="cpu", offload_to_disk=False)  # offloaded weights could not be read back
    loaded = GPTQModel.load(task.model, config, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in task.tokens]
    loaded.quantize(rows, batch_size=1)
    found: dict[str, torch.Tensor] = {}
    for name, module in loaded.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            found[f"{name}.weight"] = module.dequantize_weight().T
    return found


if __name__ == "__main__":
    serve(quantize)
