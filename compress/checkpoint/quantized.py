"""The one type of a quantized weight: integer codes, scales and zero points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bluelm.errors import InputError


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight W [out, in] as W = (codes - zeros) * scales, groups running along `in`.

    Attributes:
        codes: uint8 [out, in], each in [0, 2**bits - 1], one code a byte (stores and runtimes pack them).
        scales: float16 [out, groups], positive at 4 and 8 bits. They are float16 *before* the codes are chosen, so that
            every runtime holds them exactly. float32 only where another quantizer's scales are no float16s.
        zeros: uint8 [out, groups], each in [0, 2**bits - 1]; 2**(bits - 1) everywhere when symmetric.
        bits: 4 or 8; 3 for comparisons.
        group_size: columns that share one scale; -1 for one group a row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = 1 if self.group_size == -1 else columns // self.group_size
        if self.group_size != -1 and groups * self.group_size != columns:
            raise InputError(f"group size {self.group_size} does not divide {columns} columns")
        if self.scales.shape != (rows, groups) or self.zeros.shape != (rows, groups):
            raise InputError(
                f"codes {tuple(self.codes.shape)} in groups of {self.group_size} need scales and zeros "
                f"{(rows, groups)}, found {tuple(self.scales.shape)} and {tuple(self.zeros.shape)}"
            )
        dtypes = (self.codes.dtype, self.scales.dtype, self.zeros.dtype)
        if dtypes not in ((torch.uint8, kind, torch.uint8) for kind in (torch.float16, torch.float32)):
            raise InputError(f"codes, scales, zeros must be uint8, float16 (or float32), uint8; found {dtypes}")
        if self.bits >= 4 and not (self.scales > 0).all():
            raise InputError(
                "a scale is not above zero, which runtimes cannot hold",
                fix="quantize the checkpoint again",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def groups(self) -> int:
        """Groups a row."""
        return self.scales.shape[1]

    @property
    def columns_per_group(self) -> int:
        """Columns that share a scale; `in` when there is one group a row."""
        return self.shape[1] // self.groups

    @property
    def symmetric(self) -> bool:
        """True when every zero point is the middle code."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def with_rows(self, turn: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """The weight of other rows: `turn` picks or reorders the rows of a [out, …] tensor; no value changes."""
        codes, scales, zeros = turn(self.codes), turn(self.scales), turn(self.zeros)
        return QuantizedTensor(codes, scales, zeros, self.bits, self.group_size)

    def signed_codes(self) -> Tensor:
        """int8 [out, in]: codes - 2**(bits - 1), as runtimes with signed integers hold them."""
        return (self.codes - 2 ** (self.bits - 1)).view(torch.int8)  # uint8 wraps around; no wider copy

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        codes, scales, zeros = (tensor.to(device) for tensor in (self.codes, self.scales, self.zeros))
        return QuantizedTensor(codes, scales, zeros, self.bits, self.group_size)

    def dequantize(self) -> Tensor:
        """float32 [out, in], what every runtime must reproduce."""
        rows, columns = self.shape
        codes = self.codes.view(rows, self.groups, self.columns_per_group).to(torch.float32)
        weight = (codes - self.zeros.unsqueeze(-1)) * self.scales.to(torch.float32).unsqueeze(-1)
        return weight.view(rows, columns)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight: codes, scales, and zero points unless symmetric."""
        per_group = 8 * self.scales.element_size() + (0 if self.symmetric else self.bits)
        return self.bits + per_group / self.columns_per_group


@dataclass(frozen=True)
class OrderedWeight:
    """A quantized weight whose columns may lie in another order than its inputs.

    GPTQ's act-order without static groups lets scattered inputs share a scale. Sorted by group the codes have
    contiguous groups again, and the linear is exact on inputs put in that order: y = W x = stored @ x[order].

    Attributes:
        order: int32 [in]; stored column j belongs to input order[j]. None: as the inputs are.
    """

    weight: QuantizedTensor
    order: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 [out, in], the columns as the inputs are."""
        stored = self.weight.dequantize()
        if self.order is None:
            return stored
        weight = torch.empty_like(stored)
        weight[:, self.order.long()] = stored
        return weight
