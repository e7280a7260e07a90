"""LiteRT: one .tflite with the signatures `prefill` (a chunk of tokens) and `decode` (one token)."""

from __future__ import annotations

from pathlib import Path

from export.litert_file import LitertModel, Type
from export.litert_ops import LitertOps, Symbol
from export.lowered import KeysValues, decoder

CACHE_TYPES = {32: Type.FLOAT32, 16: Type.FLOAT16}


def write(quantized, path: Path, *, context: int, chunk: int, kv_bits: int) -> None:  # noqa: ANN001
    """Write the model. Inputs and outputs of a signature of T tokens, C = context:

    tokens int32 [T], positions int32 [T], mask float32 [1, 1, T, C], and for each layer keys_N
    [1, kv_heads, head_dim, C - T] and values_N [1, kv_heads, C - T, head_dim], float16 or float32
    -> logits float32 [1, T, vocab], new_keys_N [1, kv_heads, head_dim, T], new_values_N [1, kv_heads, T, head_dim].
    """
    model = LitertModel("bluelm-export")
    for name, tokens in (("prefill", chunk), ("decode", 1)):
        _signature(model, quantized, name, tokens, context, CACHE_TYPES[kv_bits])
    model.save(path)


def _signature(model: LitertModel, quantized, name: str, tokens: int, context: int, cache_type: int) -> None:  # noqa: ANN001
    config = quantized.config
    graph = model.subgraph(name)
    ops = LitertOps(graph, quantized.linear, quantized.vector, config.rms_norm_eps, cache_type)
    heads, size, past_slots = config.num_kv_heads, config.head_dim, context - tokens
    ids = ops.input("tokens", (tokens,), Type.INT32)
    positions = ops.input("positions", (tokens,), Type.INT32)
    mask = ops.input("mask", (1, 1, tokens, context))
    stored = {
        f"{kind}_{layer}": ops.input(f"{kind}_{layer}", shape, cache_type)
        for layer in range(config.num_layers)
        for kind, shape in (("keys", (1, heads, size, past_slots)), ("values", (1, heads, past_slots, size)))
    }
    read: dict[str, Symbol] = {key: ops.read_cache(x, f"{key}.read") for key, x in stored.items()}
    past = [KeysValues(read[f"keys_{i}"], read[f"values_{i}"]) for i in range(config.num_layers)]
    x = ops.embed(ids, "model.embed_tokens", quantized.embed)
    logits, new = decoder(ops, config, x, positions, mask, past, context)
    outputs = {"logits": logits.index}
    for layer, pair in enumerate(new):
        outputs[f"new_keys_{layer}"] = ops.write_cache(pair.keys, f"new_keys_{layer}").index
        outputs[f"new_values_{layer}"] = ops.write_cache(pair.values, f"new_values_{layer}").index
    inputs = {"tokens": ids.index, "positions": positions.index, "mask": mask.index}
    inputs |= {key: x.index for key, x in stored.items()}
    model.signature(name, graph, inputs, outputs)
