"""AWQ checkpoints in AutoAWQ's GEMM layout, 4 bits.

    qweight int32 [in, out / 8]      codes of 8 outputs a word, in the order 0 2 4 6 1 3 5 7
    qzeros  int32 [groups, out / 8]  zero points, packed alike
    scales  float16 [groups, out]

The scales that AWQ found lie in the weights and norms already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bluelm.errors import InputError
from compress.checkpoint.pieces import LinearInfo
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.formats.claims import NOTHING, Claim
from compress.formats.layout import MatrixShape, check_symmetric, group_of, make_weight
from compress.formats.words import pack_words, unpack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # field i of a word holds output ORDER[i]
BITS = 4


@dataclass(frozen=True)
class Awq:
    """The layout above."""

    name: str = "AWQ (gemm)"
    marker: str = "qweight"

    def shapes(self, shape: MatrixShape, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        groups = found["scales"][0] if found.get("scales") else 1
        group_of(groups, shape.columns)
        words = shape.rows * BITS // 32
        return {
            "qweight": (shape.columns, words),
            "qzeros": (groups, words),
            "scales": (groups, shape.rows),
        }

    def read(self, shape: MatrixShape, parts: Mapping[str, Tensor], claim: Claim = NOTHING) -> OrderedWeight:
        codes = in_order(unpack_words(parts["qweight"], BITS)).T  # [out, in]
        zeros = in_order(unpack_words(parts["qzeros"], BITS)).T  # [out, groups]
        if claim.symmetric:
            check_symmetric(zeros, BITS, "the settings say symmetric")
        return OrderedWeight(make_weight(codes.contiguous(), parts["scales"].T, zeros.contiguous(), BITS))


def in_order(fields: Tensor) -> Tensor:
    """Fields [..., out] of words as the outputs follow one another."""
    back = torch.tensor(ORDER).argsort()
    return fields.unflatten(-1, (-1, 8))[..., back].flatten(-2)


def awq_layout(settings: Mapping[str, Any], where: object) -> Awq:
    """The layout that a quantization_config of the method awq describes.

    Raises:
        InputError: another version than gemm, or another width than 4.
    """
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if version != "gemm":
        fix = "use a checkpoint in AutoAWQ's version GEMM, its default"
        raise InputError(f"AWQ in the version {version!r} cannot be read", where=where, fix=fix)
    if bits != BITS:
        raise InputError(f"AWQ's layout has 4 bits, not {bits!r}", where=where, fix="use a 4-bit checkpoint")
    return Awq()


def pack_awq(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a linear.

    Raises:
        InputError: scales that are no float16s.
    """
    if weight.scales.dtype != torch.float16:
        fix = "use --format compressed-tensors"
        raise InputError("AWQ's scales are float16, and these have more digits", fix=fix)

    def packed(fields: Tensor) -> Tensor:  # [out, n] -> [n, out / 8]
        return pack_words(fields.T.unflatten(-1, (-1, 8))[..., list(ORDER)].flatten(-2), BITS)

    return {"qweight": packed(weight.codes), "qzeros": packed(weight.zeros), "scales": weight.scales.T}


def describe_awq(infos: Mapping[str, LinearInfo]) -> dict[str, Any]:
    """The quantization_config; all linears have one group size."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": next(iter(infos.values())).group_size,
        "zero_point": True,  # stored for symmetric weights too: 8
        "modules_to_not_convert": None,
    }
