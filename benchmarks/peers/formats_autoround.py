"""auto-round's exports, with the weights that its own linears compute with beside them.

PYTHON formats_autoround.py MODEL TOKENS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from common import any_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

# name -> (symmetric, format); asymmetric ones fail to save in 0.16.1, wanting AWQ's linear
SETTINGS = {"auto_round": (True, "auto_round"), "auto_gptq": (True, "auto_gptq")}
GROUP = 32


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """What its linear makes of the identity: the weight, float32 [out, in]."""
    tensors = load_file(next(folder.rglob("model*.safetensors")))
    found: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        columns, rows = tensors[name].shape[0] * 8, tensors[name].shape[1]
        linear = QuantLinear(4, GROUP, columns, rows, False)
        for part in ("qweight", "qzeros", "scales"):
            getattr(linear, part).copy_(tensors[f"{stem}.{part}"])
        linear.scales = linear.scales.float()
        linear.post_init()
        found[f"{stem}.weight"] = linear(torch.eye(columns)).T.float().contiguous()
    return found


def main() -> None:
    model, tokens, out = sys.argv[1], load_file(sys.argv[2])["tokens"], Path(sys.argv[3])
    torch.set_num_threads(1)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    for name, (symmetric, kind) in SETTINGS.items():
        folder = out / f"wrote-autoround-{name}"
        if not folder.exists():
            compressor = AutoRound(
                AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
                any_tokenizer(),
                scheme={"bits": 4, "group_size": GROUP, "sym": symmetric, "data_type": "int"},
                iters=2,
                dataset=batches,
                seqlen=tokens.shape[1],
                nsamples=len(tokens),
                device_map="cpu",
            )
            compressor.quantize()
            compressor.save_quantized(str(folder), format=kind, inplace=True)
        with torch.inference_mode():
            save_file(dequantized(folder), folder.with_suffix(".safetensors"))
        print(folder.name, flush=True)


if __name__ == "__main__":
    main()
