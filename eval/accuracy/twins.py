"""What an artifact's arithmetic should cost on this model and text: a twin in torch that rounds as its runtime does.

A twin gives two answers of the same decoder, plain and rounded, so that only the rounding differs. Runtimes that
compute in float32 around linears with 8-bit inputs are modelled by the float decoder with those inputs rounded; those
that round every value (float16 of Core ML, 16 bits of NPUs) by the lowered decoder, value by value. The weights are the
quantized checkpoint's, never the artifact's: wrong weights of an artifact do not change its twin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from bluelm.config import ModelConfig
from bluelm.model import DecoderBlock
from bluelm.rope import inverse_frequencies, rope_rows
from bluelm.weights import Weights
from eval.accuracy.twin_blocks import Noisy
from export.artifacts.artifact import Artifact, find_source
from export.lowering import decoder as lowered
from export.lowering.ranges import Ranges, causal_mask
from export.lowering.torch_ops import Parameters, Plain, Rounded, TorchOps
from export.onnx.reader import read_model
from targets.host.rounding import ByColumns, RoundedCache, Rounding, by_token, rounding_inputs, to_half
from targets.host.torch_runtime import LoweredRuntime, RoundingRuntime, TorchRuntime, rounded_mask
from targets.runtime import Place, Runtime

SPAN = 2.0  # of an 8-bit cache's range, to the largest value of a text: 1.25 is headroom
MASKED = -1e4  # hides a score, and lies within float16


class Twin(Protocol):
    """The same weights, once as they are and once as a runtime rounds."""

    def pair(self, exact: TorchRuntime) -> tuple[Runtime, Runtime]:
        """(plain, rounded) runtimes around the weights that `exact` holds."""
        ...

    def block(self, weights: Weights, layer: int, x: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """(plain, rounded) outputs of one block on x [1, n, hidden] from position 0."""
        ...


@dataclass(frozen=True)
class InputsRounded:
    """Float32 but for what linears read, and what the cache holds; None: as it is."""

    inputs: Rounding | None
    cached: Rounding | None

    def pair(self, exact: TorchRuntime) -> tuple[Runtime, Runtime]:
        return exact, RoundingRuntime(exact, self.inputs, self.cached)

    @torch.no_grad()
    def block(self, weights: Weights, layer: int, x: Tensor, context: int) -> tuple[Tensor, Tensor]:
        config = weights.config
        block = DecoderBlock.from_weights(config, weights.block(layer))
        cos, sin = rope_rows(inverse_frequencies(config, context), 0, x.shape[1])
        plain = block(x, cos, sin)
        cache = RoundedCache(_one_layer(config), x.shape[1])
        cache.rounding = self.cached
        if self.inputs is None:
            return plain, block(x, cos, sin, cache)
        with rounding_inputs(block, self.inputs):
            return plain, block(x, cos, sin, cache)


@dataclass(frozen=True)
class ValuesRounded:
    """Every value of the lowered decoder rounded: to float16, or to an NPU's codes where there are ranges.

    Attributes:
        noisy: products carry the noise of HTP's arithmetic as well.
    """

    ranges: Ranges | None = None
    noisy: bool = False

    def pair(self, exact: TorchRuntime) -> tuple[Runtime, Runtime]:
        weights, context = exact.weights, exact.context
        mask = MASKED if self.ranges is None else rounded_mask(self.ranges)
        plain, rounded = (
            LoweredRuntime(name, weights, ops, mask, context)
            for name, ops in zip(("plain", "rounded"), self._sides(weights), strict=True)
        )
        return plain, rounded

    @torch.no_grad()
    def block(self, weights: Weights, layer: int, x: Tensor, context: int) -> tuple[Tensor, Tensor]:
        count = x.shape[1]
        found: list[Tensor] = []
        for ops in self._sides(weights):
            rotary = lowered.rotary_factors(ops, weights.config, torch.arange(count), context)
            found.append(lowered.block(ops, weights.config, layer, x, rotary, causal_mask(count), None)[0])
        return found[0], found[1]

    def _sides(self, weights: Weights) -> tuple[TorchOps, TorchOps]:
        epsilon, parameters = weights.config.rms_norm_eps, Parameters(weights)
        plain = TorchOps(parameters, epsilon)
        if self.ranges is None:
            return plain, TorchOps(_HalfParameters(weights), epsilon, _Halved())
        kind = Noisy if self.noisy else TorchOps
        return plain, kind(parameters, epsilon, Rounded(self.ranges))


def twin_of(artifact: Artifact, on: Place) -> Twin | None:
    """The twin of an artifact that runs there; None where nothing tells how it rounds."""
    record = artifact.record
    if record.ranges == "always":
        source = artifact if record.compiled_from is None else find_source(artifact)
        return None if source is None else ValuesRounded(Ranges.load(source.path("ranges")), on == "htp")
    if record.arithmetic == "float16" and "float16 activations" in artifact.notes:
        return ValuesRounded()
    inputs = by_token if record.arithmetic == "8-bit activations" else None
    if record.levels and (sizes := rounded_blocks(artifact)):
        inputs = ByColumns(sizes)
    cached = {"float16": to_half, "int8": by_token if record.ranges == "never" else _spanned}
    return InputsRounded(inputs, cached.get(artifact.cache))


def rounded_blocks(artifact: Artifact) -> tuple[tuple[int, int], ...]:
    """Of linears at accuracy level 4 of an ONNX artifact: (columns, columns that share a scale), the most of any."""
    found: dict[int, int] = {}
    for path in artifact.paths("prefill") or artifact.paths("model"):
        for node in read_model(path).graph.node:
            numbers = {a.name: a.i for a in node.attribute}
            if numbers.get("accuracy_level") == 4 and "K" in numbers:
                columns = numbers["K"]
                found[columns] = max(found.get(columns, 1), numbers.get("block_size", 1))
    return tuple(found.items())


class _Halved(Plain):
    """Every value to float16."""

    def value(self, name: str, x: Tensor) -> Tensor:
        return to_half(x)

    def share(self, x: Tensor) -> Tensor:
        return to_half(x)

    def masked(self, name: str, x: Tensor, visible: Tensor) -> Tensor:
        return to_half(x)

    def constant(self, x: Tensor) -> Tensor:
        return to_half(x)


class _HalfParameters(Parameters):
    """Weights as a float16 program holds them."""

    def __call__(self, name: str) -> Tensor:
        return to_half(super().__call__(name))


def _spanned(x: Tensor) -> Tensor:
    """8 bits around zero, as calibrated ranges of a cache span it: calibration text reaches further than this one."""
    scale = (x.abs().max() * SPAN / 127).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.round(x / scale) * scale


def _one_layer(config: ModelConfig) -> ModelConfig:
    return replace(config, num_layers=1)
