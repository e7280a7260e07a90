"""Choosing the grid of a weight: a float16 scale and a zero point a group, before any code is chosen.

Scales are rounded to values that float16 and bfloat16 both hold (8 significant bits): XNNPACK's blockwise
kernels store bfloat16 scales, most other runtimes float16, and codes chosen for a rounded scale lose next to
nothing.

Two ways: `minmax` spans the group's extremes; with `search` the span is shrunk to what loses least, in the
plain squared error or in the error that it makes in the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bluelm.errors import InputError
from compress.checkpoint.quantized import QuantizedTensor

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
LARGEST_SCALE = 65280.0  # the largest value that is a float16 and a bfloat16
SHRINKS = tuple(1 - step / 40 for step in range(27))  # 1.0 down to 0.35 of the span
CHUNK = 2**18  # weights handled at a time: what the search makes of them stays in the cache

Loss = Callable[[Tensor], Tensor]  # errors float32 [out, groups, columns] -> loss float32 [out, groups]


@dataclass(frozen=True)
class Grid:
    """What codes mean: W = (codes - zeros) * scales.

    Attributes:
        scales: float16 [out, groups], finite; positive, but for symmetric grids of 3 bits.
        zeros: uint8 [out, groups]; 2**(bits - 1) everywhere when symmetric.
        bits: 4 or 8 (3 for comparisons).
        group_size: columns that share a scale; -1 for one group a row.
    """

    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int

    @property
    def largest_code(self) -> int:
        return 2**self.bits - 1

    def nearest(self, weight: Tensor) -> QuantizedTensor:
        """Round each weight to the nearest point of the grid. weight: float32 [out, in]."""
        scales, zeros = self.scales.float().unsqueeze(-1), self.zeros.float().unsqueeze(-1)
        codes = _encode(_grouped(weight, self.group_size), scales, zeros, self.largest_code)
        return self.holding(codes.view(weight.shape).to(torch.uint8))

    def holding(self, codes: Tensor) -> QuantizedTensor:
        """The quantized weight with these codes, uint8 [out, in]."""
        return QuantizedTensor(codes, self.scales, self.zeros, self.bits, self.group_size)


def choose_grid(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    search: bool = False,
    hessian: Tensor | None = None,
) -> Grid:
    """Scale and zero point of every group of a weight.

    Args:
        weight: float32 [out, in], finite. Zero groups, outliers and tiny values are fine.
        search: try spans from 1.0 down to 0.35 of the group's and keep the one that loses least.
        hessian: float32 [in, in], mean of x xᵀ over calibration tokens; the search then weighs errors by what
            they do to the output: e H_g eᵀ within a group (its diagonal alone when a group is a whole row).

    Raises:
        InputError: the group size does not divide the columns, or a weight is too large for float16 scales.
    """
    largest = weight.abs().max().item()
    if largest > LARGEST_SCALE * (2 ** (bits - 1) - 1):
        raise InputError(
            f"a weight of {largest:.3g} is too large for {bits}-bit codes with float16 scales",
            fix="check the checkpoint: trained weights are far smaller",
        )
    loss = output_loss(hessian, group_size) if search and hessian is not None else _squared_error
    rows = max(1, CHUNK // weight.shape[1])
    parts = [
        _choose(_grouped(part, group_size), bits, symmetric, SHRINKS if search else (1.0,), loss)
        for part in weight.split(rows)
    ]
    scales = torch.cat([scales for scales, _ in parts]).to(torch.float16)
    zeros = torch.cat([zeros for _, zeros in parts]).to(torch.uint8)
    return Grid(scales, zeros, bits, group_size)


def output_loss(hessian: Tensor, group_size: int) -> Loss:
    """Squared error of the output that one group's rounding errors make, the other groups left exact."""
    if group_size == -1:
        diagonal = hessian.diagonal()
        return lambda error: (error.square() * diagonal).sum(-1)
    starts = range(0, hessian.shape[0], group_size)
    blocks = torch.stack([hessian[i : i + group_size, i : i + group_size] for i in starts])

    def loss(error: Tensor) -> Tensor:
        spread = torch.bmm(error.transpose(0, 1), blocks).transpose(0, 1)  # [out, groups, columns]
        return (spread * error).sum(-1)

    return loss


def _squared_error(error: Tensor) -> Tensor:
    return error.square().sum(-1)


def _choose(
    weight: Tensor, bits: int, symmetric: bool, shrinks: tuple[float, ...], loss: Loss
) -> tuple[Tensor, Tensor]:
    """Best (scales, zeros), float32 [out, groups], float16 in value; weight: [out, groups, columns]."""
    largest = 2**bits - 1
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    best_scales, best_zeros = _span(low, high, bits, symmetric)
    if len(shrinks) == 1:
        return best_scales, best_zeros
    least = torch.full_like(low, torch.inf)
    for shrink in shrinks:
        scales, zeros = _span(low * shrink, high * shrink, bits, symmetric)
        wide_scales, wide_zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
        codes = _encode(weight, wide_scales, wide_zeros, largest)
        lost = loss(codes.sub_(wide_zeros).mul_(wide_scales).sub_(weight))
        better = lost < least
        least = torch.where(better, lost, least)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def representable(scales: Tensor) -> Tensor:
    """The nearest values but zero that float16 and bfloat16 both hold, as float32 of the same shape; +0 and -0 become
    the smallest positive one."""
    sizes = scales.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.bfloat16).to(torch.float16).float()
    return torch.where(scales < 0, -sizes, sizes)


def _span(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scales, zeros) whose grid spans [low, high], low <= 0 <= high."""
    half = 2 ** (bits - 1)
    # symmetric codes reach from -half to half - 1: the side that needs more decides
    scales = torch.maximum(high / (half - 1), -low / half) if symmetric else (high - low) / (2 * half - 1)
    scales = representable(scales)
    if symmetric and bits < 4:
        # with a negative scale it is the upper side that has one code more: of 8 codes that is much. Not at 4 bits:
        # phones' kernels take positive scales alone
        turned = representable(torch.maximum(high / half, -low / (half - 1)))
        scales = torch.where(turned < scales, -turned, scales)
    if symmetric:
        return scales, torch.full_like(scales, half)
    return scales, torch.round(-low / scales).clamp_(0, 2 * half - 1)


def _encode(weight: Tensor, scales: Tensor, zeros: Tensor, largest: int) -> Tensor:
    """Codes as float32, of the shape of `weight`."""
    return (weight / scales).round_().add_(zeros).clamp_(0, largest)


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """[out, in] -> [out, groups, columns]."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise InputError(
            f"group size {group_size} does not divide {columns} columns",
            fix="choose a group size that divides every layer's width, or -1 for one scale a row",
        )
    return weight.view(rows, columns // size, size)
