"""Codes on disk: two 4-bit codes a byte, the even column in the low half; 8-bit codes as they are."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] of values below 2**bits -> uint8 [rows, ceil(columns * bits / 8)]."""
    if bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack` was given, uint8 [rows, columns]."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns].contiguous()
