"""llm-compressor's checkpoints, with the weights that it left in the model beside them.

PYTHON formats_llmcompressor.py MODEL TOKENS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import any_tokenizer, linears
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

SETTINGS = {
    "sym": {"symmetric": True, "actorder": "static"},
    "asym": {"symmetric": False, "actorder": "static"},
    "8-bit": {"symmetric": True, "num_bits": 8},
}


def main() -> None:
    model, tokens, out = sys.argv[1], load_file(sys.argv[2])["tokens"], Path(sys.argv[3])
    torch.set_num_threads(1)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    for name, settings in SETTINGS.items():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **settings}
        scheme = {"targets": ["Linear"], "weights": weights}
        oneshot(
            model=loaded,
            tokenizer=any_tokenizer(),
            dataset=Dataset.from_list(rows),
            recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
            max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens),
            shuffle_calibration_samples=False,
        )
        folder = out / f"wrote-llmcompressor-{name}"
        kept = {key: weight.detach().float().clone() for key, weight in linears(loaded).items()}
        save_file(kept, folder.with_suffix(".safetensors"))
        loaded.save_pretrained(str(folder), save_compressed=True)
        print(folder.name, flush=True)


if __name__ == "__main__":
    main()
