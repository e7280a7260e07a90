"""GGUF, read back."""

from __future__ import annotations

from collections.abc import Iterator

from compress.quantized import QuantizedTensor
from compress.store import EMBED, QuantizedCheckpoint
from export.artifact import Artifact
from export.readback.held import linear_names, same, stored


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Rows of a Llama's q and k lie in neighbouring pairs."""
    from export.gguf_file import LOCAL_NAMES, interleaved
    from export.gguf_reader import GgufWeights

    config = quantized.config
    found = GgufWeights(artifact.path("model"), config)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for name in [*linear_names(quantized), EMBED]:
        weight = quantized.linear(name)
        short = {EMBED: "token_embd", "lm_head": "output"}.get(name, "")
        if not short:
            _, _, layer, local = name.split(".", 3)
            local = LOCAL_NAMES[local]
            short = f"blk.{layer}.{local}"
            if local in heads and not config.qkv_bias:
                codes, scales, zeros = (
                    interleaved(t, heads[local]) for t in (weight.codes, weight.scales, weight.zeros)
                )
                weight = QuantizedTensor(codes, scales, zeros, weight.bits, weight.group_size)
        try:
            held = found.quantized(f"{short}.weight")
        except (KeyError, AssertionError):  # not there, or not quantized
            yield name
            continue
        if not same(weight, stored(held)):
            yield name
