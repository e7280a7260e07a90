"""GGUF, read back: every tensor and every key of the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bluelm.errors import InputError
from bluelm.rope import inverse_frequencies
from compress.store import QuantizedCheckpoint
from export.artifact import Artifact
from export.readback.held import same, stored

if TYPE_CHECKING:
    from export.gguf_reader import GgufFile

ROUNDING = 2.5e-7  # two float32 steps: powers differ by so much between processors
ROPE = "rope"


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Names of the checkpoint's tensors, or keys of the file, that are others than they should be."""
    from export.gguf_file import tensors
    from export.gguf_reader import GgufFile
    from export.readback import gguf_keys, gguf_vocabulary

    file = GgufFile(artifact.path("model"))
    wanted = dict(tensors(quantized.config))
    for name, source in wanted.items():
        if source != ROPE and not _same(file, name, source, quantized):
            yield source
    yield from sorted(file.tensors.keys() - wanted.keys())
    if not _turns_alike(file, quantized):
        yield ROPE
    keys = {**gguf_keys.model(quantized.config, artifact.context), **gguf_vocabulary.keys(quantized)}
    yield from gguf_keys.differing(file.fields, keys)


def _same(file: GgufFile, name: str, source: str, quantized: QuantizedCheckpoint) -> bool:
    """Whether a tensor of the file is the checkpoint's, its rows in the file's order."""
    from export.gguf_file import F32, in_file_order, is_linear

    config = quantized.config
    if is_linear(source):
        weight = quantized.linear(source).with_rows(lambda part: in_file_order(config, source, part))
        try:
            return same(weight, stored(file.quantized(name)))
        except InputError:  # not there, or not quantized
            return False
    found, vector = file.tensors.get(name), in_file_order(config, source, quantized.vector(source))
    return found is not None and found.tensor_type == F32 and np.array_equal(found.data, vector.numpy())


def _turns_alike(file: GgufFile, quantized: QuantizedCheckpoint) -> bool:
    """Whether the angles that llama.cpp makes of the file's base and factors are the model's.

    angle of pair j, a position: base**(-2j/d) / factor[j], in float64 here (ggml_rope_ext)
    """
    from export.gguf_file import F32, architecture

    config, factors = quantized.config, file.tensors.get("rope_freqs.weight")
    try:
        base = file.number(f"{architecture(config)}.rope.freq_base")
    except InputError:
        return False
    angles = base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if factors is not None:
        if factors.tensor_type != F32 or tuple(factors.shape) != angles.shape:
            return False
        angles = angles / factors.data.astype(np.float64)
    return np.allclose(angles, inverse_frequencies(config).numpy(), rtol=ROUNDING, atol=1e-20)
