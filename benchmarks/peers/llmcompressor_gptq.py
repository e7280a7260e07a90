"""llm-compressor's GPTQ (GPTQModifier, act order by static groups)."""

from __future__ import annotations

from typing import Any

import torch
from common import Task, any_tokenizer, linears, serve


def quantize(task: Task, model: Any) -> dict[str, torch.Tensor]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    scheme = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": task.bits,
            "type": "int",
            "symmetric": task.symmetric,
            "strategy": "group",
            "group_size": task.group_size,
            "actorder": "static",
        },
    }
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in task.tokens]
    oneshot(
        model=model,
        tokenizer=any_tokenizer(),
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=task.tokens.shape[1],
        num_calibration_samples=len(task.tokens),
        shuffle_calibration_samples=False,
    )
    return linears(model)


if __name__ == "__main__":
    serve(quantize)
