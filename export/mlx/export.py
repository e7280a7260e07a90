"""MLX's folder `model`: an affine checkpoint that holds our codes as they are, for mlx-lm and mlx-swift-lm.

    codes [out, in], scales, zeros [out, groups]  ->  weight uint32 [out, in * bits / 32], the first code lowest,
                                                      scales, biases float16 [out, groups], bias = -scale * zero
    MLX computes scale * code + bias, which is (code - zero) * scale.

A scale that serves more columns than MLX's largest group is repeated. Format: `mlx.core.quantize`, mode "affine".
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from bluelm.system.files import atomic_folder, write_text
from bluelm.system.progress import Progress, Silent
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from compress.formats.plain import plain_config
from compress.formats.shards import Shards
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import complete_weights
from export.mlx import FOLDER
from export.readback.items import vector_names
from export.tokenizer.fast import write_tokenizer

GROUPS = (32, 64, 128)
"""Columns that share a scale, as MLX has kernels for."""
NOTE = "float16 activations"
SHARD = 2**30  # bytes of tensors a file, which wait in memory


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    about: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`; what MLX's programs open is `model` in it.

    Args:
        context: told as the longest sequence.
        about: what the model card says: `name`, `license`, where they are known.

    Raises:
        TargetError: MLX cannot hold a weight exactly, or computes no such model; says why.
    """
    check_model(quantized.config)
    with atomic_folder(folder) as temporary:
        (temporary / FOLDER).mkdir()
        files = _weights(quantized, temporary / FOLDER, progress or Silent())
        roles = {f"{FOLDER}/{name}": "model" if name.endswith(".safetensors") else "index" for name in files}
        config = json.dumps(settings(quantized, context), indent=1) + "\n"
        texts = {"config.json": config, "README.md": model_card(about or {})}
        for name, text in texts.items():
            write_text(temporary / FOLDER / name, text)
        written = write_tokenizer(quantized, temporary / FOLDER, context)
        roles |= {f"{FOLDER}/{name}": "runner" for name in (*texts, *written)}
        complete_weights(temporary, "mlx", quantized, roles, context, "mlx-lm", about, notes=(NOTE,))
    return Artifact.open(folder)


def check_model(config: ModelConfig) -> None:
    """TargetError unless MLX computes the model."""
    try:
        plain_config(config)
    except InputError as error:
        raise TargetError(error.problem, fix="use --runtime coreml") from None
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        raise TargetError(
            "MLX turns a dynamic rope by what was said so far, not by the context", fix="use --runtime coreml"
        )


def check_recipe(config: ModelConfig, recipe: Recipe) -> None:
    """TargetError unless MLX holds what the recipe makes of every weight."""
    columns = {name: linear.columns for name, linear in block_of(config).linears.items()}
    groups = {name: (recipe.group_size, width) for name, width in columns.items()}
    groups |= {HEAD: (recipe.head_group_size, config.hidden_size), EMBED: (-1, config.hidden_size)}
    for name, (group, width) in groups.items():
        _check_span(name, width if group == -1 else group, recipe.symmetric)


def settings(quantized: QuantizedCheckpoint, context: int) -> dict[str, Any]:
    """config.json: the plain model, and how each weight is held that is not held as most are."""
    config = plain_config(quantized.config)
    scaling = config["rope_scaling"]
    if scaling is not None and scaling["rope_type"] == "longrope":  # it would scale attention beyond this
        scaling["original_max_position_embeddings"] = max(scaling["original_max_position_embeddings"], context)
    kinds = {name: _kind(name, quantized) for name in quantized.linears}
    (group, bits), _ = Counter(kinds.values()).most_common(1)[0]
    others = {name: kind for name, kind in sorted(kinds.items()) if kind != (group, bits)}
    held: dict[str, Any] = {"group_size": group, "bits": bits, "mode": "affine"}
    held |= {name: {"group_size": group, "bits": bits} for name, (group, bits) in others.items()}
    return config | {"max_position_embeddings": context, "quantization": held, "quantization_config": held}


def model_card(about: Mapping[str, str]) -> str:
    """README.md: what hubs and apps show."""
    front = {"library_name": "mlx", **({"license": about["license"]} if "license" in about else {})}
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", ""]
    return "\n".join([*lines, f"# {about.get('name', 'model')}", ""])


def group_of(columns: int) -> int | None:
    """MLX's group for scales that serve so many columns; None where it has none."""
    group = math.gcd(columns, GROUPS[-1])
    return group if group in GROUPS else None


def check_weight(weight: QuantizedTensor, name: str) -> int:
    """MLX's group of a weight.

    Raises:
        TargetError: it has none for this one, or float16 does not hold its scales and -scale * zero exactly.
    """
    group = _check_span(name, weight.columns_per_group, weight.symmetric)
    if weight.scales.dtype != torch.float16:
        problem = "MLX computes in float16, and these scales have more digits"
        raise TargetError(problem, where=name, fix="use --runtime onnx-cpu, or quantize the float checkpoint here")
    if not torch.isfinite(biases(weight)).all():
        problem = "the products of scales and zero points are beyond float16"
        raise TargetError(problem, where=name, fix="use --runtime coreml")
    return group


def _check_span(name: str, columns: int, symmetric: bool) -> int:
    """MLX's group where a scale serves so many columns, or TargetError."""
    group = group_of(columns)
    if group is None:
        problem = f"MLX has groups of {', '.join(map(str, GROUPS))} columns, and a scale here serves {columns}"
        raise TargetError(problem, where=name, fix="use --group-size 32, 64 or 128, or --runtime coreml")
    if not symmetric:
        problem = "float16 does not hold the products of scales and zero points exactly"
        raise TargetError(problem, where=name, fix="use a symmetric recipe")
    return group


def biases(weight: QuantizedTensor) -> Tensor:
    """float16 [out, groups]: -scale * zero, exact where zero is a power of two."""
    return -(weight.scales.float() * weight.zeros.float()).half()


def pack(weight: QuantizedTensor, name: str) -> dict[str, Tensor]:
    """`weight` int32 (the bits of uint32), `scales` and `biases` float16.

    Raises:
        TargetError: as `check_weight`.
    """
    times = weight.columns_per_group // check_weight(weight, name)
    parts = {"scales": weight.scales, "biases": biases(weight)}
    words = {"weight": words_of(weight.codes, weight.bits)}
    return words | {part: tensor.repeat_interleave(times, dim=1) for part, tensor in parts.items()}


def words_of(codes: Tensor, bits: int) -> Tensor:
    """uint8 [out, in] -> uint32 [out, in * bits / 32], the first code in the lowest bits."""
    rows, columns = codes.shape
    per = 8 // bits
    shifts = torch.arange(per, dtype=torch.uint8) * bits
    packed = (codes.view(rows, columns // per, per) << shifts).sum(-1, dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(packed.numpy()).view("<u4"))


def _kind(name: str, quantized: QuantizedCheckpoint) -> tuple[int, int]:
    info = quantized.linears[name]
    span = info.shape[1] if info.group_size == -1 else info.group_size
    return group_of(span) or span, info.bits


def _weights(quantized: QuantizedCheckpoint, folder: Path, progress: Progress) -> list[str]:
    """One weight in memory at a time, besides what waits for its file; the files' names."""
    shards = Shards(folder, SHARD, "mlx")
    names = list(quantized.linears)
    with progress.task("write MLX", len(names)) as task:
        for name in names:
            parts = pack(quantized.linear(name), name)
            shards.add({f"{name}.{part}": tensor for part, tensor in parts.items()})
            task.advance(note=name)
    for name in vector_names(quantized):
        shards.add({name: _half(quantized.vector(name), name)})
    return shards.finish()


def _half(vector: Tensor, name: str) -> Tensor:
    half = vector.half()
    if not torch.isfinite(half).all():
        raise TargetError("values beyond float16", where=name, fix="use --runtime coreml --activation-bits 32")
    return half
