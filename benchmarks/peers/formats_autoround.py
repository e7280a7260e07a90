"""auto-round's exports, with the weights that it left in the model beside them.

PYTHON formats_autoround.py MODEL TOKENS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from common import any_tokenizer, linears
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

# name -> (symmetric, format)
SETTINGS = {
    "auto_round": (True, "auto_round"),
    "auto_round-asym": (False, "auto_round"),
    "auto_gptq": (True, "auto_gptq"),
    "auto_awq": (False, "auto_awq"),
}


def main() -> None:
    model, tokens, out = sys.argv[1], load_file(sys.argv[2])["tokens"], Path(sys.argv[3])
    torch.set_num_threads(1)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    for name, (symmetric, kind) in SETTINGS.items():
        compressor = AutoRound(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            any_tokenizer(),
            scheme={"bits": 4, "group_size": 32, "sym": symmetric, "data_type": "int"},
            iters=2,
            dataset=batches,
            seqlen=tokens.shape[1],
            nsamples=len(tokens),
            device_map="cpu",
        )
        quantized, _ = compressor.quantize()
        folder = out / f"wrote-autoround-{name}"
        kept = {key: weight.detach().float().clone() for key, weight in linears(quantized).items()}
        save_file(kept, folder.with_suffix(".safetensors"))
        compressor.save_quantized(str(folder), format=kind, inplace=True)
        print(folder.name, flush=True)


if __name__ == "__main__":
    main()
