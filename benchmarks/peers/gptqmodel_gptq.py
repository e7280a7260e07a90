"""GPTQModel's GPTQ, its defaults."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Task, serve


def quantize(task: Task, _: Any) -> dict[str, torch.Tensor]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    widths = {"bits": task.bits, "group_size": task.group_size, "sym": task.symmetric}
    config = QuantizeConfig(**widths, device="cpu", offload_to_disk=False)  # offloaded weights could not be read back
    loaded = GPTQModel.load(task.model, config, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in task.tokens]
    loaded.quantize(rows, batch_size=1)
    found: dict[str, torch.Tensor] = {}
    with TemporaryDirectory() as folder:  # until it is written and read again, zero points are off by one
        loaded.save(folder)
        read = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH).model
        for name, module in read.named_modules():
            if hasattr(module, "dequantize_weight"):
                found[f"{name}.weight"] = module.dequantize_weight().T.float()
    return found


if __name__ == "__main__":
    serve(quantize, loads=False)
