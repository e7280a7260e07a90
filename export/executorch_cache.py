"""The KV cache of the ExecuTorch decoder: mutable buffers that the fused attention operators read and write."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bluelm.config import ModelConfig


class Cache(nn.Module):
    """Keys and values of one layer, [1, context, kv_heads, head_dim] each."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        """Put key and value [1, T, kv_heads, head_dim] at `start`; causal attention of query [1, T, heads, head_dim]."""
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
        mixed = torch.ops.llama.custom_sdpa(query.to(dtype), self.keys, self.values, start, None, 0, True)
        return mixed.to(query.dtype)


def make_cache(config: ModelConfig, context: int, bits: int) -> Cache:
    return FloatCache(config, context, {32: torch.float32, 16: torch.float16}[bits])
