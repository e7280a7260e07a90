"""AutoAWQ, its defaults: scales and clipping searched.

With `mended` as seventh argument the weights that it puts back behind every trial are copies. As it is, they are the
very weights on a CPU (`v.cpu()` copies nothing there), scaled by the first trial.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import Task, any_tokenizer, serve, with_norms


def quantize(task: Task, _: Any) -> dict[str, torch.Tensor]:
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.module import get_named_linears

    if "mended" in sys.argv[7:]:
        mend(AwqQuantizer)
    loaded = AutoAWQForCausalLM.from_pretrained(task.model, torch_dtype=torch.float32, device_map="cpu")
    widths = {"w_bit": task.bits, "q_group_size": task.group_size, "zero_point": not task.symmetric}
    loaded.quantize(
        any_tokenizer(),
        quant_config={**widths, "version": "GEMM"},
        calib_data=task.tokens.tolist(),
        max_calib_samples=len(task.tokens),
        max_calib_seq_len=task.tokens.shape[1],
        export_compatible=True,  # scaled and clipped; rounded below instead of packed
    )
    for block in loaded.get_model_layers(loaded.model):
        for linear in get_named_linears(block).values():
            rounded, _, _ = loaded.quantizer.pseudo_quantize_tensor(linear.weight.data.half())
            linear.weight.data = rounded.float()
    return with_norms(loaded.model)


def mend(quantizer: Any) -> None:
    """Let what it remembers of a module be copies."""
    search = quantizer._compute_best_scale

    def mended(self: Any, x: Any, w_mean: Any, x_mean: Any, module: Any, *others: Any, **named: Any) -> Any:
        own = module.state_dict
        module.state_dict = lambda: {name: value.clone() for name, value in own().items()}
        try:
            return search(self, x, w_mean, x_mean, module, *others, **named)
        finally:
            del module.state_dict

    quantizer._compute_best_scale = mended


if __name__ == "__main__":
    serve(quantize, loads=False)
