"""What an artifact must hold of a quantized checkpoint, item by item, and what a format's reader says of each.

A reader goes through a finished file with the format's own reader and gives a `Finding` for every item of
`inventory`: right (equal, bit for bit, in the form that the format stores), wrong, or untold (the format does not
tell it). What it says nothing of was forgotten, which `export.readback.read_back` counts as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact

ROPE = "rope"
"""Cosines and sines of every position of the context (or the frequencies), in the type that the format stores."""
CONTEXT = "context"
"""How many slots and positions the program is laid out for."""
CACHE = "KV cache"
"""The type of the cached keys and values, as artifact.json says it."""
MASK = "mask value"
"""What is added to the score of a slot that must not be seen."""
ENCODINGS = "activation encodings"
"""Scales and zero points of activations, or of an int8 cache; of formats that round them."""
GRAPH = "operations"
"""That the program computes this model: its operations, how they are connected, and nothing else."""
TELLS = "metadata"
"""What the file itself tells a runner: sizes, special tokens, the tokenizer's tables, how to sample."""


@dataclass(frozen=True)
class Finding:
    """What a reader says of one item.

    Attributes:
        item: its name in `inventory`; another one only where something is wrong that the inventory does not know.
        told: if wrong, what is ("codes", "0.01 instead of 1e-05"); if untold, a sentence that says why.
    """

    item: str
    state: Literal["right", "wrong", "untold"] = "right"
    told: str = ""

    def __str__(self) -> str:
        return f"{self.item}: {self.told}" if self.told else self.item


Reader = Callable[[Artifact, QuantizedCheckpoint], Iterator[Finding]]


def right(*items: str) -> Iterator[Finding]:
    """All of them are."""
    yield from map(Finding, items)


def untold(sentence: str, *items: str) -> Iterator[Finding]:
    """The format tells none of them."""
    yield from (Finding(item, "untold", sentence) for item in items)


def checked(item: str, faults: Iterable[str]) -> Iterator[Finding]:
    """Wrong once for each fault; right where there is none."""
    found = list(faults)
    yield from (Finding(item, "wrong", fault) for fault in found)
    if not found:
        yield Finding(item)


def equal(item: str, found: object, wanted: object) -> Iterator[Finding]:
    """Right if both are the same."""
    yield from checked(item, [] if found == wanted else [f"{found} instead of {wanted}"])


def linear_names(quantized: QuantizedCheckpoint) -> list[str]:
    """The quantized weights of blocks and head, in the checkpoint's order."""
    names = [name for name in quantized.linears if name != EMBED]
    return names if "lm_head" in names else [*names, "lm_head"]


def weight_names(quantized: QuantizedCheckpoint) -> list[str]:
    """The same and the embedding table."""
    return [*linear_names(quantized), EMBED]


def vector_names(quantized: QuantizedCheckpoint) -> list[str]:
    """Norms' weights (`….weight`) and biases (`….bias`)."""
    return [name for header in quantized.headers.values() for name in header.vectors]


def norm_names(quantized: QuantizedCheckpoint) -> list[str]:
    """Norms' weights, `model.layers.0.input_layernorm.weight`."""
    return [name for name in vector_names(quantized) if name.endswith(".weight")]


def eps(norm: str) -> str:
    """The item of a norm's epsilon; `norm` is its weight's name."""
    return f"{norm.removesuffix('.weight')} epsilon"


def attention_scale(layer: int) -> str:
    """The item of what the scores of a layer are multiplied by, head_dim**-0.5."""
    return f"model.layers.{layer} attention scale"


def inventory(artifact: Artifact, quantized: QuantizedCheckpoint) -> list[str]:
    """All that the artifact's program must hold; names alone, nothing is read."""
    rounded = artifact.record.encodings or artifact.cache == "int8"
    return [
        *weight_names(quantized),
        *vector_names(quantized),
        *map(eps, norm_names(quantized)),
        *map(attention_scale, range(quantized.config.num_layers)),
        *(ROPE, CONTEXT, CACHE, MASK, GRAPH, TELLS),
        *([ENCODINGS] if rounded else []),
    ]
