"""The decoder as a torch module that ExecuTorch lowers: integer codes and scales stay integers, the
cache is a buffer.

Exported once with a free number of tokens T: chunks of the prompt (T up to `chunk`) and single tokens
(T = 1) enter by the same method `forward(tokens int64 [1, T], input_pos int64 [1]) -> logits float32
[1, T, vocab]`, which is the signature of ExecuTorch's `TextLLMRunner`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from executorch.kernels import quantized as _operators  # noqa: F401  (registers the embedding operator)
from torch import Tensor, nn
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.rope import rope_table
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.executorch.cache import Cache, make_cache


def parts(weight: QuantizedTensor) -> dict[str, Tensor]:
    """codes int8 [out, in], scales float32 and zeros int8 [out, groups], as XNNPACK's rules expect them."""
    return {
        "codes": weight.signed_codes(),
        "scales": weight.scales.to(torch.float32),
        "zeros": torch.zeros(weight.scales.shape, dtype=torch.int8),
    }


def as_is(tensor: Tensor) -> Tensor:
    return tensor


class QuantizedLinear(nn.Module):
    """x [1, T, in] -> [1, T, out] with 4-bit codes in groups, or 8-bit codes with one scale a row.

    The input comes from `round_to_8_bits`: XNNPACK fuses this pattern (quantize, dequantize, dequantized weight,
    linear) into integer kernels, one of the rounding and one of each linear behind it, and packs the codes as they are.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(
        self, name: str, weight: QuantizedTensor, bias: Tensor | None = None, hold: Callable[[Tensor], Tensor] = as_is
    ) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("bias", bias)  # float32 [out]
        for part, tensor in parts(weight).items():
            self.register_buffer(part, hold(tensor))
        self.rows, self.columns = weight.shape
        self.block = (1, weight.columns_per_group)
        self.least, self.greatest = -(2 ** (weight.bits - 1)), 2 ** (weight.bits - 1) - 1

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize_affine(
            self.codes, self.block, self.scales, self.zeros, torch.int8, self.least, self.greatest
        )
        return F.linear(x, weight, self.bias)


def round_to_8_bits(x: Tensor) -> Tensor:
    """x [1, T, n] through int8 codes and back, one asymmetric range a token."""
    block: Any = (1, 1, x.shape[-1])
    scale, zero = choose_qparams_affine(
        x,
        mapping_type=MappingType.ASYMMETRIC,
        block_size=block,
        target_dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int8,
    )
    codes = quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
    return dequantize_affine(codes, block, scale, zero, torch.int8, -128, 127)


class Embedding(nn.Module):
    """tokens int64 [1, T] -> float32 [1, T, hidden] from one byte a weight, one scale a row."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, table: QuantizedTensor) -> None:
        super().__init__()
        half = 2 ** (table.bits - 1)
        self.register_buffer("codes", table.signed_codes())  # int8 [vocab, hidden]
        self.register_buffer("scales", table.scales.to(torch.float32))  # [vocab, groups]
        self.register_buffer("zeros", table.zeros.to(torch.float32) - half)  # [vocab, groups]

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.ops.quantized_decomposed.embedding_byte.dtype(
            self.codes, self.scales, self.zeros, -128, 127, tokens, dtype=torch.float32
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * weight, rounded to 8 bits for the linears behind it.

    XNNPACK has no mean of a free number of rows: it is a linear of one output, weights 1/n and bias eps.
    """

    weight: Tensor
    share: Tensor
    eps: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)  # [n]
        self.register_buffer("share", torch.full((1, len(weight)), 1 / len(weight)))
        self.register_buffer("eps", torch.tensor([eps]))

    def forward(self, x: Tensor) -> Tensor:
        power = F.linear(x * x, self.share, self.eps)  # [1, T, 1]
        return round_to_8_bits(x * torch.rsqrt(power) * self.weight)


class Attention(nn.Module):
    """Grouped-query attention over the cache, by ExecuTorch's fused operator."""

    turn: Tensor

    def __init__(self, config: ModelConfig, linears: dict[str, QuantizedLinear], cache: Cache) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.register_buffer("turn", quarter_turn(config.head_dim))
        self.q, self.k, self.v, self.o = (linears[f"self_attn.{name}_proj"] for name in ("q", "k", "v", "o"))
        self.cache = cache

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        query, key, value = (
            linear(x).view(1, -1, linear.rows // self.head_dim, self.head_dim)  # [1, T, heads or kv_heads, head_dim]
            for linear in (self.q, self.k, self.v)
        )
        mixed = self.cache.attend(self.rotate(query, cos, sin), self.rotate(key, cos, sin), value, start)
        return self.o(round_to_8_bits(mixed.view(1, -1, self.o.columns)))  # [1, T, hidden]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of x [1, T, heads, head_dim] with cos, sin [T, 1, head_dim]; halves turn together."""
        return x * cos + F.linear(x, self.turn) * sin


def quarter_turn(size: int) -> Tensor:
    """The matrix of x = (a, b) -> (-b, a) for halves a and b, float32 [size, size].

    XNNPACK cuts no tensor of a free number of rows, but multiplies it; products with 0 and 1 are exact.
    """
    half = torch.eye(size // 2)
    return torch.cat((torch.cat((torch.zeros_like(half), -half), 1), torch.cat((half, torch.zeros_like(half)), 1)))


class Block(nn.Module):
    """x [1, T, hidden] -> the same: attention, then the gated MLP, each behind a norm and added."""

    def __init__(
        self,
        config: ModelConfig,
        linears: dict[str, QuantizedLinear],
        norms: tuple[Tensor, Tensor],
        cache: Cache,
    ) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (RMSNorm(norm, config.rms_norm_eps) for norm in norms)
        self.attention = Attention(config, linears, cache)
        self.gate, self.up, self.down = (linears[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, start)
        inner = self.mlp_norm(x)
        return x + self.down(round_to_8_bits(F.silu(self.gate(inner)) * self.up(inner)))


class ExecutorchDecoder(nn.Module):
    """forward(tokens int64 [1, T], input_pos int64 [1]) -> logits float32 [1, T, vocab].

    With `debug` also the stream before the first block and behind each, float32 [layers + 1, T, hidden].
    `input_pos` is how many tokens the cache holds; `check` is called with every linear weight and its name. `hold`
    makes the buffers of its codes, scales and zeros.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        quantized: QuantizedCheckpoint,
        *,
        context: int,
        kv_bits: int,
        check: Callable[[QuantizedTensor, str], None],
        debug: bool = False,
        hold: Callable[[Tensor], Tensor] = as_is,
    ) -> None:
        super().__init__()
        config = quantized.config
        self.context, self.debug = context, debug

        def linear(name: str) -> QuantizedLinear:
            weight = quantized.linear(name)
            check(weight, name)
            biased = config.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj"))
            return QuantizedLinear(name, weight, quantized.vector(f"{name}.bias") if biased else None, hold)

        def block(layer: int) -> Block:
            at = f"model.layers.{layer}"
            linears = {name: linear(f"{at}.{name}") for name in block_of(config).linears}
            norms = (
                quantized.vector(f"{at}.input_layernorm"),
                quantized.vector(f"{at}.post_attention_layernorm"),
            )
            return Block(config, linears, norms, make_cache(config, context, kv_bits))

        self.embedding = Embedding(quantized.embed())
        cos, sin = rope_table(config, context)  # [context, head_dim]
        self.register_buffer("cos", cos.unsqueeze(1))
        self.register_buffer("sin", sin.unsqueeze(1))
        self.blocks = nn.ModuleList(block(layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(quantized.vector("model.norm"), config.rms_norm_eps)
        self.head = linear("lm_head")

    def sources(self) -> dict[str, str]:
        """Prefixes of the linears' buffers, each with the checkpoint's name of the weight."""
        return {path: module.name for path, module in self.named_modules() if isinstance(module, QuantizedLinear)}

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        start = cast(int, input_pos[0].item())
        count = tokens.shape[1]
        torch._check(start >= 0)
        torch._check(start < self.context)
        torch._check(start + count <= self.context)
        cos, sin = (table.narrow(0, start, count) for table in (self.cos, self.sin))  # [T, 1, head_dim]
        x = self.embedding(tokens)
        stream = [x]
        for block in self.blocks:
            x = block(x, cos, sin, start)
            stream.append(x)
        logits = self.head(self.norm(x))
        return (logits, torch.cat(stream)) if self.debug else logits
