"""Compares the memory that a model needs with a device's, before any work."""

from __future__ import annotations

from dataclasses import dataclass

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from compress.recipe import Recipe
from targets.legality import weight_bytes

APP_SHARE = 0.6
"""Of a phone's RAM, what one app can hold before the system kills it: Android and iOS keep the rest
for themselves and what runs beside (iOS documents no figure; jetsam limits reported by developers lie
between 50 and 70 %)."""
GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """Bytes that a loaded model holds while it answers."""

    weights: float
    cache: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "KV cache": self.cache, "activations": self.activations}
        return " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


def footprint(config: ModelConfig, recipe: Recipe, context: int, chunk: int, kv_bits: int) -> Footprint:
    """What the artifact needs.

    Weights: codes and scales of blocks, head and embedding. Cache: keys and values of every layer for
    `context` tokens. Activations of one chunk in float32: the stream, the widest inner layer three
    times, scores of one layer, and the logits.
    """
    block, head = weight_bytes(config, recipe)
    embedding = config.vocab_size * config.hidden_size * recipe.embed_bits / 8
    weights = config.num_layers * block + head + embedding
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * context * kv_bits / 8
    layer = block_of(config)
    widest = max(linear.rows for linear in layer.linears.values())
    row = 4 * config.hidden_size + 3 * widest + layer.attention.heads * context + config.vocab_size
    return Footprint(weights, cache, 4.0 * chunk * row)


def check_memory(
    config: ModelConfig, recipe: Recipe, context: int, chunk: int, kv_bits: int, device_ram_gb: float
) -> Footprint:
    """The footprint, if a device of `device_ram_gb` GiB holds it.

    Raises:
        TargetError: it does not; says by how much, and what would fit.
    """
    need = footprint(config, recipe, context, chunk, kv_bits)
    room = APP_SHARE * device_ram_gb * GIB
    if need.total <= room:
        return need
    raise TargetError(
        f"the model needs {need.total / GIB:.2f} GiB ({need}), "
        f"and an app on a phone with {device_ram_gb:g} GB can hold about {room / GIB:.2f}",
        fix=_what_fits(config, recipe, context, chunk, kv_bits, room),
    )


def _what_fits(config: ModelConfig, recipe: Recipe, context: int, chunk: int, kv_bits: int, room: float) -> str:
    """The least change that fits: a narrower cache, a shorter context, fewer bits, or the least phone."""

    def fits(recipe: Recipe, context: int, kv_bits: int) -> bool:
        return footprint(config, recipe, context, min(chunk, context), kv_bits).total <= room

    for bits in (bits for bits in (16, 8) if bits < kv_bits):
        if fits(recipe, context, bits):
            return f"use --kv-bits {bits}"
    shorter = next((c for c in (2**n for n in range(20, 6, -1)) if c < context and fits(recipe, c, kv_bits)), None)
    if shorter is not None:
        return f"use --context {shorter}"
    small = recipe.model_copy(update={"bits": 4, "head_bits": 4, "embed_bits": 8})
    if recipe.bits == 8 and fits(small, context, kv_bits):
        return "use --bits 4"
    least = footprint(config, recipe, context, chunk, kv_bits).total / APP_SHARE / GIB
    return f"it wants a phone with {least:.0f} GB or more, or a smaller model"
