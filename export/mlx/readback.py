"""MLX's folder, read back: every tensor of its files, and every key that decides what MLX computes of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.rope import rope_table
from bluelm.system.reading import read_json
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.mlx import FOLDER
from export.mlx.reader import MlxFiles, effective
from export.readback import items
from export.readback.items import Finding
from export.tokenizer.readback_fast import faults as tokenizer_faults

PLACES = {"max_position_embeddings": items.CONTEXT, "rope_theta": items.ROPE, "rope_scaling": items.ROPE}
"""Items of config.json's keys; all others are the model's operations, or what it tells."""
TELLING = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
ANGLE = 8e-8
"""By what an angle of MLX's, a float32, may be off for each position."""


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[Finding]:
    """Of every item of the inventory.

    Raises:
        InputError: the folder cannot be read.
    """
    folder = artifact.folder / FOLDER
    config, files = read_json(folder / "config.json"), MlxFiles(folder)
    known: set[str] = set()
    for name in quantized.linears:
        known |= {f"{name}.{part}" for part in ("weight", "scales", "biases")}
        yield from items.checked(name, _weight_faults(files, name, quantized.linear(name), config))
    for name in items.linear_names(quantized):
        if name not in quantized.linears:  # the head of a tied model
            yield from items.equal(name, config.get("tie_word_embeddings"), True)
    for name in items.vector_names(quantized):
        known.add(name)
        found, wanted = files.get(name), quantized.vector(name).half().numpy()
        same = found is not None and found.dtype == wanted.dtype and np.array_equal(found, wanted)
        yield from items.checked(name, [] if same else ["other numbers"])
    faults = _config_faults(config, quantized.config, artifact.context)
    faults[items.GRAPH] += [f"{name} is none of this model's" for name in sorted(files.names - known)]
    faults[items.ROPE] += _turn_faults(config, quantized.config, artifact.context)
    faults[items.TELLS] += [*tokenizer_faults(folder, artifact, quantized), *_card_faults(folder, artifact.about)]
    for item in (items.GRAPH, items.CONTEXT, items.ROPE, items.TELLS):
        yield from items.checked(item, faults[item])
    for name in items.norm_names(quantized):
        yield from items.checked(items.eps(name), faults["rms_norm_eps"])
    for layer in range(quantized.config.num_layers):
        yield from items.checked(items.attention_scale(layer), faults["head_dim"])
    yield from items.equal(items.CACHE, artifact.cache, "float16")  # of the activations' type, as scales and norms are
    yield from items.right(items.MASK)  # mlx-lm's own, of no file


def _weight_faults(files: MlxFiles, name: str, weight: QuantizedTensor, config: Mapping[str, Any]) -> Iterator[str]:
    """Codes as they are, scales repeated, and biases that are exactly -scale * zero."""
    try:
        group, bits = effective(config, name)
        codes, scales, biases = files.quantized(name, bits)
    except InputError as error:
        yield error.problem
        return
    rows, columns = weight.shape
    if bits != weight.bits or weight.columns_per_group % group or scales.shape != (rows, columns // group):
        yield f"{bits} bits in groups of {group} instead of {weight.bits} bits in groups of {weight.columns_per_group}"
        return
    times = weight.columns_per_group // group
    wanted = weight.scales.numpy().repeat(times, axis=1)
    zeros = weight.zeros.numpy().repeat(times, axis=1)
    if not np.array_equal(codes, weight.codes.numpy()):
        yield "codes"
    if scales.dtype != np.float16 or scales.tobytes() != np.ascontiguousarray(wanted).tobytes():
        yield "scales"
    product = -wanted.astype(np.float64) * zeros
    if biases.dtype != np.float16 or not np.array_equal(biases.astype(np.float64), product):
        yield "zero points"


def _config_faults(found: Mapping[str, Any], config: ModelConfig, context: int) -> defaultdict[str, list[str]]:
    """By item: keys of config.json that are others than the model's, or unknown; of all that MLX's classes read."""
    faults: defaultdict[str, list[str]] = defaultdict(list)
    wanted = _wanted(config, context)
    for key in sorted({*found, *wanted} - {"rope_scaling", "quantization"}):
        first, second = (json.dumps(side.get(key, "nothing")) for side in (found, wanted))
        if key == "quantization_config":
            second = json.dumps(found.get("quantization", "nothing"))
        if first == second:
            continue
        fault = f"{key} of config.json is {first[:80]} instead of {second[:80]}"
        faults[PLACES.get(key, items.TELLS if key in TELLING else items.GRAPH)].append(fault)
        faults[key].append(fault)
    return faults


def _wanted(config: ModelConfig, context: int) -> dict[str, Any]:
    """What config.json says beside how ropes are scaled and weights are held."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    ends = list(config.eos_token_ids)
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": context,
        "tie_word_embeddings": config.shares_table,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": config.pad_token_id,
    }


def _turn_faults(found: Mapping[str, Any], config: ModelConfig, context: int) -> list[str]:
    """Where MLX turns otherwise: its own rotation of the unit vectors, against the model's cosines and sines."""
    import mlx.core as mx
    from mlx_lm.models.rope_utils import initialize_rope

    size, half = config.head_dim, config.head_dim // 2
    try:
        rope = initialize_rope(
            size, found["rope_theta"], False, found.get("rope_scaling"), found["max_position_embeddings"]
        )
        with mx.stream(mx.cpu):
            ones = mx.concatenate([mx.ones((1, 1, context, half)), mx.zeros((1, 1, context, half))], axis=-1)
            turned = np.array(rope(ones))[0, 0]  # [context, size]: cosines, then sines
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"MLX makes no rope of config.json: {error!r}"]
    cos, sin = (table[:, :half].numpy() for table in rope_table(config, context))
    apart = np.abs(turned - np.concatenate([cos, sin], axis=-1)).max(axis=-1)
    wrong = np.flatnonzero(~(apart <= 1e-6 + ANGLE * np.arange(context)))
    return [f"MLX turns position {wrong[0]} by other angles, {apart[wrong[0]]:.2g} apart"] if len(wrong) else []


def _card_faults(folder: Path, about: Mapping[str, str]) -> Iterator[str]:
    """README.md tells name and licence, where they are known."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in (
        f"# {about['name']}" if "name" in about else "",
        *([f"license: {json.dumps(about['license'], ensure_ascii=False)}"] if "license" in about else []),
    ):
        if line and line not in text.splitlines():
            yield f"README.md does not say {line!r}"
