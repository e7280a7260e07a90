"""GPTQ checkpoints: the layout of AutoGPTQ and GPTQModel, and of GPTQ-for-LLaMa before them.

    qweight int32 [in * bits / 32, out]     codes of 32 / bits inputs a word
    qzeros  int32 [groups, out * bits / 32] zero points of 32 / bits outputs a word
    scales  float16 [groups, out]
    g_idx   int32 [in]                      the group of each input; may be absent

In the first version of the format a zero point z is stored as z - 1, and 0 has no place: GPTQModel subtracts 1
from each field of the word at once, so that a 0 borrows from its neighbour, and adds it again on loading; other
kernels add 1 to each field by itself. The two agree unless a field is all ones; then only a file that says that
GPTQModel wrote it can be read. In the second version (`gptq_v2`) z is stored as it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as package_version
from typing import Any

import torch
from torch import Tensor

from bluelm.errors import InputError
from compress.checkpoint.pieces import LinearInfo
from compress.checkpoint.quantized import OrderedWeight
from compress.formats.claims import NOTHING, Claim
from compress.formats.layout import MatrixShape, contiguous_groups, group_of, make_weight, width_of
from compress.formats.words import pack_words, unpack_words


@dataclass(frozen=True)
class Gptq:
    """The layout above.

    Attributes:
        version: 1 stores z - 1, 2 stores z.
        borrows: GPTQModel wrote it, and subtracted from whole words.
    """

    name: str
    version: int = 1
    borrows: bool = False
    marker: str = "qweight"

    def shapes(self, shape: MatrixShape, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        words = found["qweight"][0] if found["qweight"] else 0
        bits = width_of(words, shape.columns)
        groups = found["scales"][0] if found.get("scales") else 1
        group_of(groups, shape.columns)
        wanted = {
            "qweight": (words, shape.rows),
            "qzeros": (groups, shape.rows * bits // 32),
            "scales": (groups, shape.rows),
        }
        return wanted | ({"g_idx": (shape.columns,)} if "g_idx" in found else {})

    def read(self, shape: MatrixShape, parts: Mapping[str, Tensor], claim: Claim = NOTHING) -> OrderedWeight:
        bits = width_of(parts["qweight"].shape[0], shape.columns)
        codes = unpack_words(parts["qweight"].T.contiguous(), bits)  # [out, in]
        version = self._symmetric_version(parts["qzeros"], bits) if claim.symmetric else self.version
        zeros = self._zeros(parts["qzeros"], bits, version).T.contiguous()  # [out, groups]
        weight = make_weight(codes, parts["scales"].T, zeros, bits)
        index = parts.get("g_idx")
        if claim.ordered and weight.groups > 1 and (index is None or not index.any()):
            there = "there is no g_idx" if index is None else "g_idx is all zeros"
            fix = "fetch the folder again; set desc_act to false if it was quantized with static groups"
            raise InputError(f"desc_act is true, but {there}: which inputs share a scale is not known", fix=fix)
        found = OrderedWeight(weight) if index is None else contiguous_groups(weight, index)
        if claim.ordered is False and found.order is not None:
            fix = "set desc_act to true if the file's g_idx is right"
            raise InputError(
                "desc_act is false, but g_idx scatters the groups; loaders differ in which counts", fix=fix
            )
        return found

    def _symmetric_version(self, words: Tensor, bits: int) -> int:
        """The version in which the stored zero points are those of a symmetric grid: the folder's, or the other.

        Some tools wrote one version's zero points under the other's name.

        Raises:
            InputError: they are in neither.
        """
        stored, middle = unpack_words(words, bits), 2 ** (bits - 1)
        for version in (self.version, 3 - self.version):
            if (stored == middle - (version == 1)).all():
                return version
        low, high = int(stored.min()), int(stored.max())
        said = f"{low}" if low == high else f"{low} to {high}"
        read = f"{low + 1}" if low == high else f"{low + 1} to {high + 1}"
        raise InputError(
            f"sym is true, but its zero points are stored as {said}: {read} in the format gptq and {said} in gptq_v2, "
            f"and a symmetric grid has {middle}",
            fix="set sym to false if they are meant as they are, or quantize the float checkpoint again",
        )

    def _zeros(self, words: Tensor, bits: int, version: int) -> Tensor:
        """uint8 [groups, out]."""
        if version == 2:
            return unpack_words(words, bits)
        if self.borrows:
            return unpack_words(add_to_fields(words, bits, 1), bits)
        zeros = unpack_words(words, bits)
        if (zeros == 2**bits - 1).any():
            raise InputError(
                "a zero point is stored as -1, which readers of this version take for "
                f"{2**bits} or for 0; the file does not say that GPTQModel wrote it",
                fix="convert it with GPTQModel to the format gptq_v2",
            )
        return zeros + 1


def add_to_fields(words: Tensor, bits: int, amount: int) -> Tensor:
    """int32 words plus `amount` in each field of `bits` bits, with carries, modulo 2**32."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    total = (words.long() + amount * ones) & 0xFFFFFFFF
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def gptq_layout(settings: Mapping[str, Any], where: object) -> Gptq:
    """The layout that a quantization_config of the method gptq describes.

    Raises:
        InputError: another format than gptq and gptq_v2.
    """
    kind = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if settings.get("is_marlin_format"):
        kind = "marlin"
    if kind not in ("gptq", "gptq_v2"):
        fix = "use a checkpoint in the format gptq or gptq_v2; GPTQModel converts"
        raise InputError(f"GPTQ in the format {kind!r} cannot be read", where=where, fix=fix)
    if settings.get("pack_dtype") not in (None, "int32"):
        raise InputError(f"codes packed in {settings['pack_dtype']} cannot be read", where=where, fix="pack in int32")
    meta = settings.get("meta")
    writers = str(meta.get("quantizer", "") if isinstance(meta, dict) else "").lower()
    return Gptq(f"GPTQ ({kind})", 2 if kind == "gptq_v2" else 1, borrows="gptqmodel" in writers)


def pack_gptq(ordered: OrderedWeight, version: int) -> dict[str, Tensor]:
    """The tensors of a linear; columns as the inputs are, their groups in g_idx.

    Raises:
        InputError: scales that are no float16s.
    """
    weight = ordered.weight
    if weight.scales.dtype != torch.float16:
        fix = "use --format compressed-tensors"
        raise InputError("GPTQ's scales are float16, and these have more digits", fix=fix)
    columns = weight.shape[1]
    codes = weight.codes
    groups = torch.arange(columns) // weight.columns_per_group
    if ordered.order is not None:
        back = ordered.order.long().argsort()
        codes, groups = codes[:, back], groups[back]
    zeros = weight.zeros if version == 2 else weight.zeros - 1
    return {
        "qweight": pack_words(codes, weight.bits).T,
        "qzeros": pack_words(zeros.T, weight.bits),
        "scales": weight.scales.T,
        "g_idx": groups.to(torch.int32),
    }


def describe_gptq(infos: Mapping[str, LinearInfo], version: int, damping: float) -> dict[str, Any]:
    """The quantization_config; linears of another width than most are listed under `dynamic`."""
    usual = Counter((info.bits, info.group_size) for info in infos.values()).most_common(1)[0][0]
    others = {
        f"+:^{re.escape(name)}$": {"bits": info.bits, "group_size": info.group_size}
        for name, info in infos.items()
        if (info.bits, info.group_size) != usual
    }
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "bits": usual[0],
        "group_size": usual[1],
        "sym": all(info.symmetric for info in infos.values()),
        "desc_act": any(info.ordered for info in infos.values()),
        "damp_percent": damping,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"bluelm-export:{package_version('bluelm-export')}"]},
        **({"dynamic": others} if others else {}),
    }
