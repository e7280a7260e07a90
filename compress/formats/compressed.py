"""compressed-tensors checkpoints in the format pack-quantized, as llm-compressor writes them.

    weight_packed      int32 [out, in * bits / 32]   codes of 32 / bits inputs a word
    weight_scale       [out, groups]                 in the model's dtype
    weight_zero_point  int32 [out * bits / 32, groups]   where asymmetric; packed along the outputs
    weight_g_idx       int32 [in]                    where act-order scatters the groups; read, not written: since
                                                     0.20 compressed-tensors refuses it
    weight_shape       int64 [2]

Codes and zero points are signed there: -2**(bits - 1) is stored as 0. So they are the codes that we mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bluelm.errors import InputError
from compress.checkpoint.pieces import LinearInfo
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.formats.claims import NOTHING, Claim
from compress.formats.layout import (
    WIDTHS,
    MatrixShape,
    check_symmetric,
    contiguous_groups,
    group_of,
    make_weight,
    width_of,
)
from compress.formats.words import pack_words, unpack_words

PACKED = "pack-quantized"


@dataclass(frozen=True)
class CompressedTensors:
    """The layout above."""

    name: str = f"compressed-tensors ({PACKED})"
    marker: str = "weight_packed"

    def shapes(self, shape: MatrixShape, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        words = found["weight_packed"][1] if len(found["weight_packed"]) == 2 else 0
        bits = width_of(words, shape.columns)
        groups = found["weight_scale"][-1] if found.get("weight_scale") else 1
        group_of(groups, shape.columns)
        optional = {
            "weight_zero_point": (shape.rows * bits // 32, groups),
            "weight_g_idx": (shape.columns,),
        }
        return {
            "weight_packed": (shape.rows, words),
            "weight_scale": (shape.rows, groups),
            "weight_shape": (2,),
            **{name: size for name, size in optional.items() if name in found},
        }

    def read(self, shape: MatrixShape, parts: Mapping[str, Tensor], claim: Claim = NOTHING) -> OrderedWeight:
        if parts["weight_shape"].tolist() != [shape.rows, shape.columns]:
            said = parts["weight_shape"].tolist()
            raise InputError(f"weight_shape says {said}, config.json {[shape.rows, shape.columns]}")
        bits = width_of(parts["weight_packed"].shape[1], shape.columns)
        codes = unpack_words(parts["weight_packed"], bits)
        scales = parts["weight_scale"]
        if "weight_zero_point" in parts:
            zeros = unpack_words(parts["weight_zero_point"].T.contiguous(), bits).T.contiguous()
        else:
            zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
        if claim.symmetric:
            check_symmetric(zeros, bits, "the settings say symmetric")
        if claim.symmetric is False and "weight_zero_point" not in parts:
            fix = "fetch the folder again, or set symmetric to true if it has none"
            raise InputError("the settings say asymmetric, but there is no weight_zero_point", fix=fix)
        if claim.ordered and scales.shape[1] > 1 and "weight_g_idx" not in parts:
            fix = 'fetch the folder again, or set actorder to "static" if the groups lie in place'
            raise InputError("actorder is group, but there is no weight_g_idx", fix=fix)
        weight = make_weight(codes, scales, zeros, bits)
        if "weight_g_idx" in parts:
            return contiguous_groups(weight, parts["weight_g_idx"])
        return OrderedWeight(weight)


def compressed_layout(settings: Mapping[str, Any], where: object) -> CompressedTensors:
    """The layout that a quantization_config of the method compressed-tensors describes.

    Raises:
        InputError: another format, quantized activations, sparsity.
    """
    kind = settings.get("format", PACKED)
    formats = {str(scheme.get("format") or kind) for scheme in _schemes(settings, where)} or {str(kind)}
    if formats != {PACKED}:
        fix = f"use a checkpoint in the format {PACKED}: integer weights of 4 or 8 bits"
        raise InputError(f"compressed-tensors in the format {', '.join(sorted(formats))!r} cannot be read",
                         where=where, fix=fix)  # fmt: skip
    for scheme in _schemes(settings, where):
        weights = scheme.get("weights")
        if scheme.get("input_activations") or scheme.get("output_activations"):
            fix = "use a checkpoint of which the weights alone are quantized (W4A16, W8A16)"
            raise InputError("its activations are quantized too, which no artifact here repeats", where=where, fix=fix)
        if (
            not isinstance(weights, dict)
            or weights.get("type", "int") != "int"
            or weights.get("num_bits") not in WIDTHS
        ):
            raise InputError("its weights are not 4- or 8-bit integers", where=where, fix="use W4A16 or W8A16")
    if settings.get("kv_cache_scheme"):
        raise InputError("its KV cache is quantized, which no artifact here repeats", where=where)
    return CompressedTensors()


def _schemes(settings: Mapping[str, Any], where: object) -> Iterator[dict[str, Any]]:
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(scheme, dict) for scheme in groups.values()):
        raise InputError("config_groups must be an object of schemes", where=where, fix="fetch config.json again")
    yield from groups.values()


def pack_compressed(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a linear."""
    zeros = {} if weight.symmetric else {"weight_zero_point": pack_words(weight.zeros.T, weight.bits).T}
    return {
        "weight_packed": pack_words(weight.codes, weight.bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.shape),
        **zeros,
    }


def describe_compressed(infos: Mapping[str, LinearInfo]) -> dict[str, Any]:
    """The quantization_config: a scheme for each kind of linear, the most frequent for all that others do not name."""
    schemes: dict[LinearInfo, list[str]] = {}
    for name, info in infos.items():
        schemes.setdefault(replace(info, shape=(0, 0)), []).append(name)
    ranked = sorted(schemes.items(), key=lambda item: -len(item[1]))
    targets = [["Linear"], *(names for _, names in ranked[1:])] if len(ranked) == 1 else [names for _, names in ranked]
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{number}": _scheme(info, names)
            for number, ((info, _), names) in enumerate(zip(ranked, targets, strict=True))
        },
    }


def _scheme(info: LinearInfo, targets: list[str]) -> dict[str, Any]:
    row = info.group_size == -1
    return {
        "targets": targets,
        "format": PACKED,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": info.bits,
            "type": "int",
            "symmetric": info.symmetric,
            "strategy": "channel" if row else "group",
            "group_size": None if row else info.group_size,
            "actorder": None,
            "dynamic": False,
            "observer": "minmax",
        },
    }
