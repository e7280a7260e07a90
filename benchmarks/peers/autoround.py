"""auto-round, 200 steps a block, its defaults otherwise."""

from __future__ import annotations

from typing import Any

import torch
from common import Task, any_tokenizer, linears, serve


def quantize(task: Task, model: Any) -> dict[str, torch.Tensor]:
    from auto_round import AutoRound

    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in task.tokens]
    compressor = AutoRound(
        model,
        any_tokenizer(),
        scheme={"bits": task.bits, "group_size": task.group_size, "sym": task.symmetric, "data_type": "int"},
        iters=200,
        dataset=batches,
        seqlen=task.tokens.shape[1],
        nsamples=len(task.tokens),
        device_map="cpu",
    )
    quantized, _ = compressor.quantize()
    return linears(quantized)


if __name__ == "__main__":
    serve(quantize)
