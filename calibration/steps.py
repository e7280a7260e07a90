"""A block's steps on float tensors, one after another: what calibration sees of the values between them.

B batch, T tokens, D size of a head. The formulas are those of `bluelm/model.py`, written again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bluelm.block import Add, Attend, Linear, Norm, Product, Silu, Step


@dataclass(frozen=True)
class Parameters:
    """What steps compute with.

    Attributes:
        tensor: of the block by its full name, `mlp.up_proj.weight`.
        cos, sin: rotary table [T, D].
        epsilon: of every norm.
    """

    tensor: Callable[[str], Tensor]
    cos: Tensor
    sin: Tensor
    epsilon: float

    def but(self, others: Mapping[str, Tensor]) -> Parameters:
        """The same with other tensors in some places."""
        return Parameters(
            lambda name: others[name] if name in others else self.tensor(name), self.cos, self.sin, self.epsilon
        )


def outcomes(
    steps: Sequence[Step], values: Mapping[str, Tensor], parameters: Parameters
) -> Iterator[tuple[str, Tensor]]:
    """Each step's value with its name, [B, T, width]; what no later step reads is let go.

    Args:
        values: those that the steps read and do not make.
    """
    held = dict(values)
    for place, step in enumerate(steps):
        held[step.makes] = made = outcome(step, [held[name] for name in step.inputs], parameters)
        needed = {name for later in steps[place + 1 :] for name in later.inputs}
        held = {name: value for name, value in held.items() if name in needed}
        yield step.makes, made


def value(
    steps: Sequence[Step], values: Mapping[str, Tensor], parameters: Parameters, wanted: str | None = None
) -> Tensor:
    """One value of the steps. Default: the last."""
    return next(made for name, made in outcomes(steps, values, parameters) if name == (wanted or steps[-1].makes))


def outcome(step: Step, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
    """One step of its inputs, all [B, T, width]."""
    match step:
        case Norm():
            x = inputs[0].unflatten(-1, (-1, step.size)) if inputs[0].shape[-1] != step.size else inputs[0]
            weight = parameters.tensor(f"{step.weight}.weight")
            return F.rms_norm(x, weight.shape, weight, parameters.epsilon).view(inputs[0].shape)
        case Linear():
            bias = parameters.tensor(f"{step.weight}.bias") if step.biased else None
            return F.linear(inputs[0], parameters.tensor(f"{step.weight}.weight"), bias)
        case Attend():
            return _attend(step, inputs, parameters)
        case Silu():
            return F.silu(inputs[0])
        case Product():
            return inputs[0] * inputs[1]
        case Add():
            return inputs[0] + inputs[1]


def _attend(step: Attend, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
    queries, keys, values = (x.unflatten(-1, (-1, step.size)).transpose(1, 2) for x in inputs)  # [B, heads, T, D]
    queries, keys = (_turned(x, parameters) for x in (queries, keys))
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, is_causal=queries.shape[2] > 1, scale=step.scale, enable_gqa=True
    )
    return mixed.transpose(1, 2).flatten(2)  # [B, T, heads * D]


def _turned(x: Tensor, parameters: Parameters) -> Tensor:
    """x [B, heads, T, D] with its pairs (j, j + D/2) turned by their angles."""
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * parameters.cos + swapped * parameters.sin
