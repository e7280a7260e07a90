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

from bluelm.block import STREAM, Add, Attend, Linear, Norm, Product, Silu, Step, block_of
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
    """x / sqrt(mean(x**2) + eps) * weight over the last axis.

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
        power = F.linear(x * x, self.share, self.eps)  # [1, T, 1] or, of heads, [1, T, heads, 1]
        return x * torch.rsqrt(power) * self.weight


def quarter_turn(size: int) -> Tensor:
    """The matrix of x = (a, b) -> (-b, a) for halves a and b, float32 [size, size].

    XNNPACK cuts no tensor of a free number of rows, but multiplies it; products with 0 and 1 are exact.
    """
    half = torch.eye(size // 2)
    return torch.cat((torch.cat((torch.zeros_like(half), -half), 1), torch.cat((half, torch.zeros_like(half)), 1)))


class Block(nn.Module):
    """x [1, T, hidden] -> the same, by the steps of a block's description.

    What linears read is rounded to 8 bits where it is made. Attention is ExecuTorch's fused operator over the cache.
    """

    turn: Tensor

    def __init__(self, config: ModelConfig, modules: dict[str, nn.Module], cache: Cache) -> None:
        """modules: the linears and norms by their weights' names."""
        super().__init__()
        self.described = block_of(config)
        self.rounded = {stage.name for stage in self.described.stages}
        self.register_buffer("turn", quarter_turn(config.head_dim))
        for step in self.described.steps:
            if isinstance(step, Linear | Norm):
                self.add_module(step.makes, modules[step.weight])
        self.cache = cache

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        values = {STREAM: x}
        for step in self.described.steps:
            made = self.value(step, [values[name] for name in step.inputs], (cos, sin), start)
            values[step.makes] = round_to_8_bits(made) if step.makes in self.rounded else made
        return values[self.described.stream[-1]]

    def value(self, step: Step, inputs: list[Tensor], rotary: tuple[Tensor, Tensor], start: int) -> Tensor:
        """What a step makes, [1, T, width]; heads lie apart, [1, T, heads, head_dim]."""
        match step:
            case Norm():
                return self.get_submodule(step.makes)(inputs[0])
            case Linear():
                made = self.get_submodule(step.makes)(inputs[0])
                heads = self.described.heads.get(step.makes)
                return made if heads is None else made.view(1, -1, heads, step.rows // heads)
            case Attend():
                query, key = (self.rotate(x, *rotary) for x in inputs[:2])
                return self.cache.attend(query, key, inputs[2], start).view(1, -1, step.heads * step.size)
            case Silu():
                return F.silu(inputs[0])
            case Product():
                return inputs[0] * inputs[1]
            case Add():
                return inputs[0] + inputs[1]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of x [1, T, heads, head_dim] with cos, sin [T, 1, head_dim]; halves turn together."""
        return x * cos + F.linear(x, self.turn) * sin


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

        described = block_of(config)

        def linear(name: str, biased: bool = False) -> QuantizedLinear:
            weight = quantized.linear(name)
            check(weight, name)
            return QuantizedLinear(name, weight, quantized.vector(f"{name}.bias") if biased else None, hold)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(quantized.vector(name), config.rms_norm_eps)

        def block(layer: int) -> Block:
            at = f"model.layers.{layer}"
            modules: dict[str, nn.Module] = {name: norm(f"{at}.{name}") for name in described.norms}
            modules |= {name: linear(f"{at}.{name}", one.biased) for name, one in described.linears.items()}
            return Block(config, modules, make_cache(config, context, kv_bits))

        self.embedding = Embedding(quantized.embed())
        cos, sin = rope_table(config, context)  # [context, head_dim]
        self.register_buffer("cos", cos.unsqueeze(1))
        self.register_buffer("sin", sin.unsqueeze(1))
        self.blocks = nn.ModuleList(block(layer) for layer in range(config.num_layers))
        self.norm = norm("model.norm")
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
        logits = self.head(round_to_8_bits(self.norm(x)))
        return (logits, torch.cat(stream)) if self.debug else logits
