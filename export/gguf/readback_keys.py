"""The keys of a GGUF file that llama.cpp makes a model of (llama_model::load_hparams, `llama` and `qwen2`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from bluelm.config import ModelConfig

Type = gguf.GGUFValueType
FREE = ("general.", "GGUF.")  # what is told of the file, and its own header; no model depends on it
EXACT = ("architecture", "alignment", "type", "name", "license", "version", "file_type")  # but for these


@dataclass(frozen=True)
class Value:
    """A key's value: one of `kind`, or an array of them."""

    kind: gguf.GGUFValueType
    content: Any
    array: bool = False


def model(config: ModelConfig, context: int) -> dict[str, Value]:
    """Keys of a model's shape."""
    from export.gguf.names import architecture

    name = architecture(config)
    whole = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,  # factors keep still what does not turn
        "vocab_size": config.vocab_size,
    }
    real = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_theta}
    return {
        "general.architecture": Value(Type.STRING, name),
        **{f"{name}.{key}": Value(Type.UINT32, number) for key, number in whole.items()},
        **{f"{name}.{key}": Value(Type.FLOAT32, float(np.float32(number))) for key, number in real.items()},
    }


def told(about: Mapping[str, str], widths: Mapping[int, int]) -> dict[str, Value]:
    """Keys that say what the file is.

    Args:
        widths: numbers of each width in the linears.
    """
    kind = 2 if widths.get(4, 0) >= widths.get(8, 0) else 7  # LLAMA_FTYPE_MOSTLY_Q4_0, LLAMA_FTYPE_MOSTLY_Q8_0
    named = {f"general.{key}": Value(Type.STRING, text) for key, text in about.items()}
    return {**named, "general.file_type": Value(Type.UINT32, kind)}


def differing(fields: Mapping[str, Any], wanted: Mapping[str, Value]) -> Iterator[tuple[str, str]]:
    """Keys that are missing, of another type, of another value, or that should not be there; and what is wrong.

    A key too many is one as well: a sliding window, a rope scaling or an attention scale would be another model.
    """
    for key, value in wanted.items():
        if key not in fields:
            yield key, "is missing"
        elif not same(fields[key], value):
            yield key, "is another table" if value.array else f"{_shown(fields[key])} instead of {value.content!r}"
    for key in fields:
        if key not in wanted and (key.removeprefix("general.") in EXACT or not key.startswith(FREE)):
            yield key, "is none of this model's"


def same(field: Any, value: Value) -> bool:
    """Whether a field of gguf-py's reader holds `value`, bit for bit."""
    kinds = [Type.ARRAY, value.kind] if value.array else [value.kind]
    if list(field.types[: len(kinds)]) != kinds:
        return False
    parts = [field.parts[index] for index in field.data]
    if value.kind is Type.STRING:
        texts = [bytes(part) for part in parts]
        wanted = value.content if value.array else [value.content]
        return texts == [text.encode() for text in wanted]
    found = np.concatenate(parts) if parts else np.zeros(0)
    content = np.atleast_1d(np.asarray(value.content, found.dtype))
    return found.shape == content.shape and found.tobytes() == content.tobytes()


def _shown(field: Any) -> str:
    part = field.parts[field.data[0]] if len(field.data) else np.zeros(0)
    return repr(bytes(part)[:40]) if field.types[0] is Type.STRING else str(part.tolist()[:3]).strip("[]")
