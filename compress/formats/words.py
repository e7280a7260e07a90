"""Codes in 32-bit words, as quantized Hugging Face checkpoints hold them: the first code in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

from bluelm.errors import InputError


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits], along the last axis; bits divides 32.

    Raises:
        InputError: the words are of another dtype.
    """
    if words.dtype != torch.int32:
        kind = str(words.dtype).removeprefix("torch.")
        raise InputError(f"its codes are packed in {kind}, not int32", fix="pack in int32")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    # the shift is arithmetic: the mask takes what the sign spreads
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., m] of values below 2**bits -> int32 [..., m * bits / 32]; m * bits is a multiple of 32."""
    count = 32 // bits
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // count, dtype=torch.int32)
    for index in range(count):
        words |= codes[..., index::count].to(torch.int32) << (bits * index)
    return words
