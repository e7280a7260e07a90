"""A peer loads our folders whole, on the CPU: the logits of its model.

    PYTHON formats_logits.py transformers|gptqmodel|autoawq TOKENS OUT FOLDER...

OUT gets `logits-LOADER-NAME.safetensors` for each FOLDER, with `logits` float32 [n, T, vocab]; what went wrong with one
is told, and the others go on.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on 2 cores it takes 1, and then wants 2
import torch
from safetensors.torch import load_file, save_file


def transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def gptqmodel(folder: Path) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    # its CPU kernels take nothing but float16
    return GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend=BACKEND.TORCH).model


def autoawq(folder: Path) -> Any:
    from awq import AutoAWQForCausalLM
    from awq.models import base
    from awq.modules.linear import gemm

    base.get_best_device = lambda: "cuda:0"  # on a CPU it insists on Intel's kernels, which no longer install
    gemm.TRITON_AVAILABLE = False
    return AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device_map={"": "cpu"}).model


def main() -> None:
    loader, tokens, out = sys.argv[1], load_file(sys.argv[2])["tokens"][:2], Path(sys.argv[3])
    failed = 0
    for folder in map(Path, sys.argv[4:]):
        try:
            model = {"transformers": transformers, "gptqmodel": gptqmodel, "autoawq": autoawq}[loader](folder)
            with torch.no_grad():
                logits = model(tokens).logits.float()
        except Exception:  # noqa: BLE001 - whatever a peer raises: the next folder may do
            traceback.print_exc()
            failed += 1
            continue
        kinds = sorted({type(m).__name__ for name, m in model.named_modules() if name.endswith("_proj")})
        save_file({"logits": logits.contiguous()}, out / f"logits-{loader}-{folder.name}.safetensors")
        print(loader, folder.name, *kinds, flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
