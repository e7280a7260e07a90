"""GPTQModel on the CPU: reads our folders, and writes checkpoints of its own.

    PYTHON formats_gptqmodel.py MODEL TOKENS OUT FOLDER...

OUT gets `read-gptqmodel-NAME.safetensors`, the weights that it computes with for each FOLDER, and for each of its own
settings the folder `wrote-gptqmodel-NAME` with `wrote-gptqmodel-NAME.safetensors` beside it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on 2 cores it takes 1, and then wants 2
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file

SETTINGS = {
    "sym": {"sym": True},
    "asym": {"sym": False},
    "act-order": {"sym": True, "desc_act": True, "act_group_aware": False},
    "8-bit": {"sym": True, "bits": 8},
}


def dump(folder: Path, out: Path, backend: BACKEND) -> None:
    """The dequantized weights [out, in] of every quantized linear, float16: its CPU kernels take nothing else."""
    model = GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend=backend).model
    found = {
        f"{name}.weight": module.dequantize_weight().T.contiguous()
        for name, module in model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    save_file(found, out)
    print(out.name, len(found), flush=True)


def main() -> None:
    model, tokens, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    for folder in map(Path, sys.argv[4:]):
        dump(folder, out / f"read-gptqmodel-{folder.name}.safetensors", BACKEND.TORCH)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in load_file(tokens)["tokens"]]
    for name, settings in SETTINGS.items():
        config = QuantizeConfig(**{"bits": 4, "group_size": 32, "device": "cpu", **settings})
        quantizer = GPTQModel.load(model, config, dtype=torch.float32)
        quantizer.quantize(rows, batch_size=1)
        folder = out / f"wrote-gptqmodel-{name}"
        quantizer.save(str(folder))
        dump(folder, folder.with_suffix(".safetensors"), BACKEND.TORCH)


if __name__ == "__main__":
    main()
