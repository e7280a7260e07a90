"""GGUF, read back: every tensor and every key of the file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bluelm.errors import InputError
from bluelm.rope import inverse_frequencies
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.readback import items
from export.readback.held import same, stored

if TYPE_CHECKING:
    from export.gguf.reader import GgufFile

FACTORS = "rope_freqs.weight"
ROUNDING = 2.5e-7  # two float32 steps: powers differ by so much between processors
ITEMS = {
    "attention.layer_norm_rms_epsilon": "",
    "context_length": items.CONTEXT,
    "vocab_size": items.TELLS,
    "rope.freq_base": items.ROPE,
}
"""Items of an architecture's keys; "" stands for every norm's epsilon; all others are llama.cpp's graph."""


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of the file alone; mask and cache are llama.cpp's own, and no GGUF file holds anything of them."""
    from export.gguf import readback_keys as gguf_keys
    from export.gguf import readback_vocabulary as gguf_vocabulary
    from export.gguf.export import tensors
    from export.gguf.reader import GgufFile

    file, config = GgufFile(artifact.path("model")), quantized.config
    places = {name: source for name, source in tensors(config) if source != "rope"}
    for name, source in places.items():
        item = source if is_weight(quantized, source) or source.endswith(".bias") else f"{source}.weight"
        yield from items.checked(item, [] if _same(file, name, source, quantized) else [f"{name} is another"])
    faults: dict[str, list[str]] = {
        items.GRAPH: [],
        items.TELLS: [],
        items.CONTEXT: [],
        items.ROPE: list(_turn_faults(file, quantized)),
        "": [],
    }
    faults[items.GRAPH] += [f"{name} is none of this model's" for name in file.tensors.keys() - {*places, FACTORS}]
    widths = Counter[int]()
    for source, info in quantized.linears.items():
        widths[info.bits] += math.prod(info.shape) * source.startswith("model.layers.")
    wanted = gguf_keys.model(config, artifact.context) | gguf_keys.told(artifact.about, widths)
    for key, told in gguf_keys.differing(file.fields, {**wanted, **gguf_vocabulary.keys(quantized)}):
        kind, _, name = key.partition(".")
        item = (
            items.TELLS
            if kind == "tokenizer" or (kind == "general" and name != "architecture")
            else ITEMS.get(name, items.GRAPH)
        )
        faults[item].append(f"{key}: {told}")
    for item in (items.GRAPH, items.TELLS, items.CONTEXT, items.ROPE):
        yield from items.checked(item, faults[item])
    for name in items.norm_names(quantized):
        yield from items.checked(items.eps(name), faults[""])
    scaled = [
        fault for fault in faults[items.GRAPH] if ".attention.key_length:" in fault or ".attention.scale:" in fault
    ]
    for layer in range(config.num_layers):
        yield from items.checked(items.attention_scale(layer), scaled)
    yield from items.right(items.MASK, items.CACHE)


def is_weight(quantized: QuantizedCheckpoint, source: str) -> bool:
    """Whether a tensor's item has the plain name of a quantized weight."""
    return source in quantized.linears or source in (HEAD, EMBED)


def _same(file: GgufFile, name: str, source: str, quantized: QuantizedCheckpoint) -> bool:
    """Whether a tensor of the file is the checkpoint's, its rows in the file's order."""
    from export.gguf.export import F32, in_file_order

    config = quantized.config
    if is_weight(quantized, source):
        weight = quantized.linear(source).with_rows(lambda part: in_file_order(config, source, part))
        try:
            return same(weight, stored(file.quantized(name)))
        except InputError:  # not there, or not quantized
            return False
    found, vector = file.tensors.get(name), in_file_order(config, source, quantized.vector(source))
    return found is not None and found.tensor_type == F32 and np.array_equal(found.data, vector.numpy())


def _turn_faults(file: GgufFile, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Where the angles that llama.cpp makes of the file's base and factors are not the model's.

    angle of pair j, a position: base**(-2j/d) / factor[j], in float64 here (ggml_rope_ext)
    """
    from export.gguf.export import F32
    from export.gguf.names import architecture

    config, factors = quantized.config, file.tensors.get(FACTORS)
    try:
        base = file.number(f"{architecture(config)}.rope.freq_base")
    except InputError as error:
        yield str(error)
        return
    angles = base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if factors is not None:
        if factors.tensor_type != F32 or tuple(factors.shape) != angles.shape:
            yield f"{FACTORS} is {factors.tensor_type.name} {factors.shape.tolist()}"
            return
        angles = angles / factors.data.astype(np.float64)
    wanted = inverse_frequencies(config).numpy()
    apart = ~np.isclose(angles, wanted, rtol=ROUNDING, atol=1e-20)
    if apart.any():
        pair = int(apart.argmax())
        yield f"pair {pair} turns by {angles[pair]:.9g} a position instead of {wanted[pair]:.9g}"
