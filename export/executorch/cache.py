"""The KV cache of the ExecuTorch decoder: mutable buffers that the fused attention operators read and
write."""

from __future__ import annotations

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers torch.ops.llama)
from executorch.kernels import quantized  # noqa: F401  (registers the per-token operators)
from torch import Tensor, nn

from bluelm.config import ModelConfig

LEAST, GREATEST = -128, 127


class Cache(nn.Module):
    """Keys and values of one layer, [1, context, kv_heads, head_dim] each."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        """Put key and value [1, T, kv_heads, head_dim] at `start`; causal attention of query [1, T,
        heads, head_dim]."""
        raise NotImplementedError


class FloatCache(Cache):
    """A cache of float32 or float16 numbers."""

    keys: Tensor
    values: Tensor

    def __init__(self, config: ModelConfig, context: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (1, context, config.num_kv_heads, config.head_dim)
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype))
        self.register_buffer("values", torch.zeros(shape, dtype=dtype))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        dtype = self.keys.dtype
        torch.ops.llama.update_cache(key.to(dtype), self.keys, start)
        torch.ops.llama.update_cache(value.to(dtype), self.values, start)
        mixed = torch.ops.llama.custom_sdpa(query.to(dtype), self.keys, self.values, start, None, 0.0, True)
        return mixed.to(query.dtype)


class Codes(nn.Module):
    """int8 codes [1, context, kv_heads, head_dim] with a scale and a zero point for each token and head."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        shape = (1, context, config.num_kv_heads)
        self.register_buffer("codes", torch.zeros((*shape, config.head_dim), dtype=torch.int8))
        self.register_buffer("scales", torch.ones((*shape, 1), dtype=torch.float32))
        self.register_buffer("zeros", torch.zeros((*shape, 1), dtype=torch.int8))

    def put(self, x: Tensor, start: int) -> None:
        for new, held in zip(quantize(x), (self.codes, self.scales, self.zeros), strict=True):
            torch.ops.llama.update_cache(new, held, start)


class Int8Cache(Cache):
    """A cache of 8-bit codes; queries are rounded to 8 bits too, so attention runs on integers."""

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.keys, self.values = Codes(config, context), Codes(config, context)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        self.keys.put(key, start)
        self.values.put(value, start)
        codes, scales, zeros = quantize(query)
        return torch.ops.llama.custom_quantized_sdpa(
            codes,
            self.keys.codes,
            self.values.codes,
            start,
            None,
            0.0,
            True,
            None,
            zeros,
            scales,
            self.keys.zeros,
            self.keys.scales,
            self.values.zeros,
            self.values.scales,
        )


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., n] -> int8 codes of its shape, float32 scales and int8 zero points [..., 1]."""
    ops = torch.ops.quantized_decomposed
    scales, zeros = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = ops.quantize_per_token(x, scales, zeros, LEAST, GREATEST, torch.int8)
    return codes, scales.to(torch.float32), zeros.to(torch.int8)


def make_cache(config: ModelConfig, context: int, bits: int) -> Cache:
    """A cache of 32-, 16- or 8-bit numbers."""
    if bits == 8:
        return Int8Cache(config, context)
    return FloatCache(config, context, torch.float16 if bits == 16 else torch.float32)
