"""What a layout of quantized weights is: the tensors that stand for one linear, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bluelm.errors import InputError
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.formats.claims import NOTHING, Claim
from compress.methods.grid import SMALLEST_SCALE

WIDTHS = (4, 8)
GROUP_STEP = 8  # runtimes have no blocks of other sizes


@dataclass(frozen=True)
class MatrixShape:
    """Of a linear, [out, in]."""

    rows: int
    columns: int


class Layout(Protocol):
    """One way in which quantized linears lie in a checkpoint.

    Attributes:
        name: what reports and messages call it.
        marker: the tensor below a linear's name that says that it is quantized.
    """

    @property
    def name(self) -> str: ...

    @property
    def marker(self) -> str: ...

    def shapes(self, shape: MatrixShape, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that the linear must have, by local name, given what was found.

        Raises:
            InputError: widths or groups that cannot be, told from the shapes.
        """
        ...

    def read(self, shape: MatrixShape, parts: Mapping[str, Tensor], claim: Claim = NOTHING) -> OrderedWeight:
        """The weight that the stored tensors stand for.

        Args:
            claim: what the settings say of its zero points and the order of its inputs.

        Raises:
            InputError: values that cannot be, or that are not what is claimed.
        """
        ...


def width_of(words: int, columns: int) -> int:
    """Bits of a code, where `words` 32-bit words hold `columns` codes.

    Raises:
        InputError: not 4 or 8.
    """
    bits = 32 * words / columns
    if bits not in WIDTHS:
        raise InputError(
            f"its codes have {bits:g} bits; 4 and 8 can be read",
            fix="quantize the float checkpoint with 4 or 8 bits",
        )
    return int(bits)


def group_of(groups: int, columns: int) -> int:
    """Columns that share a scale, -1 where all do.

    Raises:
        InputError: the groups do not divide the columns.
    """
    if groups < 1 or columns % groups or (groups > 1 and columns // groups % GROUP_STEP):
        raise InputError(
            f"{groups} groups do not divide its {columns} columns evenly into multiples of {GROUP_STEP}",
            fix="use a checkpoint whose group size divides every layer's width",
        )
    return -1 if groups == 1 else columns // groups


def make_weight(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> QuantizedTensor:
    """The weight (codes - zeros) * scales of another quantizer, its values exactly as they were.

    Scales become float16 where that is exact, else float32. A negative scale (auto-round has them) turns its
    group round: codes and zero point c become 2**bits - c if no code is 0 then, else 2**bits - 1 - c. A scale of
    zero becomes the smallest one, with codes at the zero point.

    Args:
        codes: uint8 [out, in]. scales: float16, bfloat16 or float32 [out, groups]. zeros: uint8 [out, groups].

    Raises:
        InputError: scales that are no finite numbers, or groups that do not divide.
    """
    rows, columns = codes.shape
    group_size = group_of(scales.shape[1], columns)
    exact = scales.float()
    if not scales.is_floating_point() or not torch.isfinite(exact).all():
        raise InputError("its scales are not finite", fix="fetch the file again, or quantize again")
    if (exact <= 0).any():
        codes, exact, zeros = _positive(codes.reshape(rows, exact.shape[1], -1), exact, zeros, bits)
        codes = codes.reshape(rows, columns)
    half = exact.half()
    scales = half if torch.equal(half.float(), exact) else exact
    return QuantizedTensor(codes.contiguous(), scales.contiguous(), zeros.contiguous(), bits, group_size)


def check_symmetric(zeros: Tensor, bits: int, said: str) -> None:
    """InputError unless every zero point is the middle code, as `said` says. zeros: uint8 of any shape."""
    middle = 2 ** (bits - 1)
    if not (zeros == middle).all():
        found = _span(zeros)
        fix = "correct the settings if the zero points are meant as they are, or quantize the float checkpoint again"
        raise InputError(f"{said}, but its zero points are {found}; a symmetric grid has {middle}", fix=fix)


def _span(zeros: Tensor) -> str:
    low, high = int(zeros.min()), int(zeros.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _positive(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same values with positive scales; codes [out, groups, columns]."""
    largest = 2**bits - 1
    negative, empty = scales < 0, scales == 0
    # about the middle where code 0 does not occur: a symmetric group stays symmetric
    about = torch.where((codes == 0).any(-1) | (zeros == 0), largest, largest + 1)
    turned = about.unsqueeze(-1) - codes.to(torch.int16)
    codes = torch.where(negative.unsqueeze(-1), turned, codes.to(torch.int16))
    zeros = torch.where(negative, about - zeros.to(torch.int16), zeros.to(torch.int16))
    codes = torch.where(empty.unsqueeze(-1), zeros.unsqueeze(-1), codes)
    scales = torch.where(empty, torch.tensor(SMALLEST_SCALE), scales.abs())
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)


def contiguous_groups(weight: QuantizedTensor, groups: Tensor) -> OrderedWeight:
    """The weight of columns that were assigned to groups one by one, sorted by group.

    Args:
        weight: its codes [out, in] in the order of the inputs, scales and zeros by group.
        groups: integer [in], the group of each column.

    Raises:
        InputError: a group that does not exist, or groups of different sizes.
    """
    columns, count = weight.shape[1], weight.groups
    if groups.is_floating_point():
        raise InputError("g_idx is not made of integers", fix="fetch the file again")
    groups = groups.long()
    in_place = torch.arange(columns) // weight.columns_per_group
    if torch.equal(groups, in_place) or not groups.any():  # zeros: a quantizer that left g_idx unused
        return OrderedWeight(weight)
    if groups.min() < 0 or groups.max() >= count:
        raise InputError(f"g_idx names group {int(groups.max())} of {count}", fix="fetch the file again")
    sizes = torch.bincount(groups, minlength=count)
    if not torch.equal(sizes, torch.full_like(sizes, weight.columns_per_group)):
        raise InputError(
            f"g_idx gives groups of {int(sizes.min())} to {int(sizes.max())} columns",
            fix="quantize with a group size that divides every layer's width",
        )
    order = groups.argsort(stable=True)
    codes = weight.codes[:, order].contiguous()
    sorted_weight = QuantizedTensor(codes, weight.scales, weight.zeros, weight.bits, weight.group_size)
    return OrderedWeight(sorted_weight, order.to(torch.int32))
