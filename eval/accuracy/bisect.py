"""Finds where an artifact differs from its model: the first block, the tensor in it, and the cause.

Every block gets the artifact's own stream as input, so that errors of earlier blocks do not count. In the first block
whose error exceeds what its runtime may cost, the values of the lowered decoder are compared one after another: the
first that differs names the tensor. The cause is: the weights, where codes or scales are not the checkpoint's or
rounding them costs that much; the activations, where rounding them as the artifact does gives the same error in torch;
else the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bluelm.block import Add, Attend, Linear, Norm, Product, Silu, block_of
from bluelm.config import ModelConfig
from bluelm.model import DecoderBlock
from bluelm.rope import inverse_frequencies, rope_rows
from bluelm.weights import Weights
from export.lowering import decoder as lowered
from export.lowering.ranges import Ranges, causal_mask
from export.lowering.torch_ops import Parameters, Plain, Rounded, TorchOps

Cause = Literal["weights", "activations", "runtime"]
Values = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class FirstFault:
    """What is wrong first.

    Attributes:
        place: "embedding", "block 3", "head", "decode".
        tensor: of the checkpoint, or the operation, that is apart.
        error, expected: relative error there, and the largest that is expected.
        cause: who did it. why: how that is known.
    """

    place: str
    tensor: str
    error: float
    expected: float
    cause: Cause
    why: str

    def __str__(self) -> str:
        return (
            f"{self.place}, {self.tensor}: error {self.error:.2e}, expected at most {self.expected:.2e}\n"
            f"  cause: {self.cause} ({self.why})"
        )


@dataclass(frozen=True)
class Probe:
    """A value of a block that is compared, the axis of its tokens, and the weight or operation that made it."""

    name: str
    axis: int
    tensor: str


def probes(config: ModelConfig) -> Iterator[Probe]:
    """In the order in which they come."""
    block = block_of(config)
    for step in block.steps:
        match step:
            case Norm() | Linear():
                yield Probe(step.makes, 1, step.weight)
            case Attend():
                yield from (Probe(name, 2, "the rope table") for name in ("q_rope", "k_rope"))
            case Product():
                left = block.makers[step.left]
                gate = left.reads if isinstance(left, Silu) else step.left
                yield Probe(step.makes, 1, f"the product of {gate} and {step.right}")
            case Add():
                (branch,) = (branch for branch in block.branches if branch.sum is step)
                yield Probe(step.makes, 1, f"the sum behind {'attention' if branch.mixes else 'the MLP'}")
            case Silu():
                pass  # in some runtimes a part of the product
            case _:
                assert_never(step)


def probe_names(config: ModelConfig, layer: int) -> list[str]:
    """Names of the values of a block that are compared."""
    return [f"layers.{layer}.{probe.name}" for probe in probes(config)]


@torch.no_grad()
def block_values(
    weights: Weights, layer: int, x: NDArray[np.float32], context: int, ranges: Ranges | None = None
) -> dict[str, NDArray[np.float32]]:
    """The values of one block on x [n, hidden] from position 0; with `ranges` rounded as an NPU artifact does."""
    kept = _Kept(ranges)
    ops = TorchOps(Parameters(weights), weights.config.rms_norm_eps, kept)
    count = len(x)
    rotary = lowered.rotary_factors(ops, weights.config, torch.arange(count), context)
    start = torch.from_numpy(np.ascontiguousarray(x))[None]
    lowered.block(ops, weights.config, layer, start, rotary, causal_mask(count), None)
    return {name: kept.values[name].numpy() for name in probe_names(weights.config, layer) if name in kept.values}


def first_apart(
    config: ModelConfig, expected: Values, found: Values, layer: int, limit: float
) -> tuple[str, str, float] | None:
    """The first value beyond the limit: its name, the weight or operation that made it, and its relative error.

    Args:
        found: as a debug build shows them, pads behind the real tokens.
    """
    for probe in probes(config):
        full, axis = f"layers.{layer}.{probe.name}", probe.axis
        if full in expected and full in found:
            error = apart(expected[full], cut(found[full], axis, expected[full].shape[axis]))
            if not error <= limit:
                return full, probe.tensor, error
    return None


def cut(x: NDArray[np.float32], axis: int, count: int) -> NDArray[np.float32]:
    """The first `count` of an axis."""
    return np.take(x, np.arange(count), axis=axis)


def apart(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Relative L2 error."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


@torch.no_grad()
def costliest_tensor(
    exact: Weights, rounded: Weights, layer: int, x: NDArray[np.float32], context: int
) -> tuple[str, float, float]:
    """The tensor whose rounding costs a block most, its cost alone, and that of all: relative errors of what it adds.

    Args:
        x: [n, hidden], from position 0.
    """
    float_block, coarse = exact.block(layer), rounded.block(layer)
    stream = torch.from_numpy(np.ascontiguousarray(x))[None]
    cos, sin = rope_rows(inverse_frequencies(exact.config, context), 0, len(x))

    def added(tensors: dict[str, Tensor]) -> Tensor:
        return DecoderBlock.from_weights(exact.config, tensors)(stream, cos, sin) - stream

    reference = added(float_block)

    def cost(names: Sequence[str]) -> float:
        mixed = {**float_block, **{f"{name}.weight": coarse[f"{name}.weight"] for name in names}}
        return float((added(mixed) - reference).norm() / reference.norm())

    linears = list(block_of(exact.config).linears)
    costs = {name: cost([name]) for name in linears}
    worst = max(costs, key=costs.__getitem__)
    return worst, costs[worst], cost(linears)


class _Kept(Plain):
    """Keeps every value; rounds them where there are ranges."""

    def __init__(self, ranges: Ranges | None) -> None:
        self.values: dict[str, Tensor] = {}
        self._how = Plain() if ranges is None else Rounded(ranges)

    def value(self, name: str, x: Tensor) -> Tensor:
        self.values[name] = self._how.value(name, x)
        return self.values[name]

    def cached(self, name: str, x: Tensor) -> Tensor:
        return self._how.cached(name, x)

    def share(self, x: Tensor) -> Tensor:
        return self._how.share(x)

    def constant(self, x: Tensor) -> Tensor:
        return self._how.constant(x)
