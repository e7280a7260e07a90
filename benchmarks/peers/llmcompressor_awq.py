"""llm-compressor's AWQ (AWQModifier), mended: its cache pins memory, which dies without an accelerator."""

from __future__ import annotations

from typing import Any

import torch
from common import Task, any_tokenizer, serve, with_norms


def quantize(task: Task, model: Any) -> dict[str, torch.Tensor]:
    from compressed_tensors.quantization import forward_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_: None
    weights = {"num_bits": task.bits, "type": "int", "symmetric": task.symmetric}
    scheme = {"targets": ["Linear"], "weights": {**weights, "strategy": "group", "group_size": task.group_size}}
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in task.tokens]
    oneshot(
        model=model,
        tokenizer=any_tokenizer(),
        dataset=Dataset.from_list(rows),
        recipe=[AWQModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])],
        max_seq_length=task.tokens.shape[1],
        num_calibration_samples=len(task.tokens),
        shuffle_calibration_samples=False,
    )
    with torch.no_grad():
        for module in model.modules():  # rounded as the checkpoint that it would write
            if hasattr(module, "quantization_scheme"):
                module.weight.copy_(
                    forward_quantize(module, module.weight, "weight", module.quantization_scheme.weights)
                )
    return with_norms(model)


if __name__ == "__main__":
    serve(quantize)
