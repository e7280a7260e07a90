"""The lowered decoder as two ExecuTorch methods of static shapes, for NPUs' delegates: `prefill` and `decode`.

Inputs and outputs are those of the ONNX graphs (`export/onnx/decoder.py`), in that order, so the same host drives
them. Weights are int8 buffers of codes with their scales; a dequantize operator stands before each product.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization.quant_primitives import dequantize_affine

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.rope import rope_table
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.lowering import decoder as lowered
from export.lowering.decoder import KeysValues, Rotary
from export.lowering.torch_ops import Parameters, TorchOps

METHODS = ("prefill", "decode")


class StaticDecoder(nn.Module):
    """forward(hidden [1, T, hidden], positions int32 [T], mask [1, 1, T, C], past keys and values by layer).

    Args:
        doubled_norms: RMSNorm as the LayerNorm of [x, -x], whose mean is zero and whose variance is mean(x**2): one
            op that float16 computes without overflow.
    """

    def __init__(
        self,
        quantized: QuantizedCheckpoint,
        context: int,
        doubled_norms: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.context = quantized.config, context
        self.doubled_norms = doubled_norms
        linears = block_of(self.config).linears
        names = [f"model.layers.{layer}.{name}" for layer in range(self.config.num_layers) for name in linears]
        self._linears: dict[str, QuantizedTensor] = {}
        for name in [*names, "lm_head"]:
            weight = quantized.linear(name)
            self._linears[name] = weight
            key = _key(name)
            self.register_buffer(f"{key}_codes", weight.signed_codes())
            self.register_buffer(f"{key}_scales", weight.scales.float())
            half = 2 ** (weight.bits - 1)
            self.register_buffer(f"{key}_zeros", (weight.zeros.to(torch.int16) - half).to(torch.int8))
        for name in _vectors(self.config):
            self.register_buffer(_key(name), quantized.vector(name))
        cos, sin = rope_table(self.config, context)  # [context, head_dim]
        half = self.config.head_dim // 2
        self.register_buffer("cos", cos)
        self.register_buffer("sin", torch.cat([-sin[:, :half], sin[:, half:]], dim=1))

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        ops = _BufferOps(self, self._linears)
        shape = (1, 1, positions.shape[0], self.config.head_dim)
        rotary = Rotary(*(self.get_buffer(name)[positions].view(shape) for name in ("cos", "sin")))
        x = hidden
        new: list[Tensor] = []
        for layer in range(self.config.num_layers):
            pair = KeysValues(past[2 * layer], past[2 * layer + 1])
            x, made = lowered.block(ops, self.config, layer, x, rotary, mask, pair)
            new += [made.keys, made.values]
        return lowered.head(ops, x), *new


class _BufferOps(TorchOps):
    """`TorchOps` whose weights are the module's buffers."""

    def __init__(self, module: nn.Module, linears: dict[str, QuantizedTensor]) -> None:
        self._module, self._linears = module, linears
        config: Any = module.config

        def parameter(name: str) -> Tensor:
            return module.get_buffer(_key(name))

        super().__init__(_Named(parameter), config.rms_norm_eps)

    def linear(self, x: Tensor, weight: str, name: str) -> Tensor:
        about, key = self._linears[weight], _key(weight)
        codes, scales, zeros = (self._module.get_buffer(f"{key}_{part}") for part in ("codes", "scales", "zeros"))
        half = 2 ** (about.bits - 1)
        block = (1, about.columns_per_group)
        return F.linear(x, dequantize_affine(codes, block, scales, zeros, torch.int8, -half, half - 1))

    def rms_norm(self, x: Tensor, weight: str, name: str) -> Tensor:
        if not self._module.doubled_norms:
            return super().rms_norm(x, weight, name)
        gamma, width = self._parameters(weight), x.shape[-1]
        both = torch.cat([x, -x], -1)  # [1, T, 2 * hidden]
        return F.layer_norm(both, (2 * width,), torch.cat([gamma, gamma]), eps=self._epsilon)[..., :width]


class _Named(Parameters):
    """Parameters by a function."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read_one = read

    def __call__(self, name: str) -> Tensor:
        return self._read_one(name)


def trace(
    quantized: QuantizedCheckpoint, *, context: int, chunk: int, doubled_norms: bool = False
) -> dict[str, ExportedProgram]:
    """Both methods by name, before any delegate."""
    module = StaticDecoder(quantized, context, doubled_norms=doubled_norms).eval()
    programs: dict[str, ExportedProgram] = {}
    with torch.inference_mode():
        for name, tokens in zip(METHODS, (chunk, 1), strict=True):
            programs[name] = torch.export.export(module, example(module.config, tokens, context), strict=False)
    return programs


def write(programs: dict[str, ExportedProgram], partitioners: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Lower both methods and write `path`; the operators that no delegate took."""
    edge = to_edge_transform_and_lower(
        dict(programs),
        partitioner={name: [partitioners[name]] for name in programs},
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    left = {
        str(node.target)
        for name in programs
        for node in edge.exported_program(name).graph.nodes
        if node.op == "call_function" and "getitem" not in str(node.target) and "delegate" not in str(node.target)
    }
    with path.open("wb") as file:
        edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True)).write_to_file(file)
    return tuple(sorted(left))


def example(config: ModelConfig, tokens: int, context: int) -> tuple[Tensor, ...]:
    """Inputs of a step of `tokens` tokens, all zero."""
    heads, size, slots = config.num_kv_heads, config.head_dim, context - tokens
    past = [
        torch.zeros(shape)
        for _ in range(config.num_layers)
        for shape in ((1, heads, size, slots), (1, heads, slots, size))
    ]
    hidden = torch.zeros(1, tokens, config.hidden_size)
    return hidden, torch.zeros(tokens, dtype=torch.int32), torch.zeros(1, 1, tokens, context), *past


def input_names(config: ModelConfig) -> list[str]:
    """Names of a step's inputs, in order."""
    pairs = [f"past_{kind}.{layer}" for layer in range(config.num_layers) for kind in ("keys", "values")]
    return ["hidden", "positions", "mask", *pairs]


def output_names(config: ModelConfig) -> list[str]:
    """Names of a step's outputs, in order."""
    layers = range(config.num_layers)
    return ["logits", *(f"{kind}.{layer}" for layer in layers for kind in ("keys", "values"))]


def _vectors(config: ModelConfig) -> list[str]:
    names, block = ["model.norm"], block_of(config)
    biases = [f"{name}.bias" for name, linear in block.linears.items() if linear.biased]
    for layer in range(config.num_layers):
        names += [f"model.layers.{layer}.{name}" for name in (*block.norms, *biases)]
    return names


def _key(name: str) -> str:
    return name.replace(".", "_")
