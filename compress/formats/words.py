"""Codes in 32-bit words, as quantized Hugging Face checkpoints hold them: the first code in the lowest bits.

In memory these are little-endian bytes of codes with the first in the low half, as in `compress.checkpoint.packing`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bluelm.errors import InputError
from compress.checkpoint.packing import pack, unpack


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, n * 32 / bits]; bits is 4 or 8.

    Raises:
        InputError: the words are of another dtype.
    """
    if words.dtype != torch.int32:
        kind = str(words.dtype).removeprefix("torch.")
        raise InputError(f"its codes are packed in {kind}, not int32", fix="pack in int32")
    return unpack(words.contiguous().view(torch.uint8), bits, words.shape[1] * 32 // bits)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, m] of values below 2**bits -> int32 [rows, m * bits / 32]; m * bits is a multiple of 32."""
    packed = pack(codes, bits)
    # a single row may have any stride and count as contiguous: only a copy has the one that the view wants
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)
