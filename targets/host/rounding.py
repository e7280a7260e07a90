"""How runtimes round what goes into a linear, or into a narrow KV cache, in torch: float32 in, float32 out.

The formulas are those of the runtimes' own sources: onnxruntime's `QuantizeARow_CompInt8`, XNNPACK's
`xnn_f32_qd8_asymmetric_quantization_params`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bluelm.model import KVCache

Rounding = Callable[[Tensor], Tensor]


def in_blocks(x: Tensor, size: int) -> Tensor:
    """8 bits around zero, a scale for each block of `size` columns of x [..., n]: MatMulNBits at accuracy level 4."""
    columns = x.shape[-1]
    blocks = F.pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(x.dtype).tiny)
    return (torch.round(blocks / scales) * scales).flatten(-2)[..., :columns]


@dataclass(frozen=True)
class ByColumns:
    """`in_blocks` for x [..., columns] of some numbers of columns: (columns, columns of a block) each; others stay."""

    sizes: tuple[tuple[int, int], ...]

    def __call__(self, x: Tensor) -> Tensor:
        size = dict(self.sizes).get(x.shape[-1])
        return x if size is None else in_blocks(x, size)


def by_token(x: Tensor) -> Tensor:
    """8 bits over the range of each row of x [..., n], widened to hold zero: XNNPACK's dynamic quantization."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scales = ((high - low) / 255).clamp_min(torch.finfo(x.dtype).tiny)
    zeros = torch.round(-128 - low / scales).clamp(-128, 127)
    codes = (torch.round(x / scales) + zeros).clamp(-128, 127)
    return (codes - zeros) * scales


def to_half(x: Tensor) -> Tensor:
    """To float16 and back; beyond its range to infinity, as a runtime does."""
    return x.half().float()


@contextmanager
def rounding_inputs(module: nn.Module, rounding: Rounding) -> Iterator[None]:
    """Every linear of the module reads rounded inputs, for as long as the context lasts."""
    linears = [one for one in module.modules() if isinstance(one, nn.Linear)]
    hooks = [one.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]),)) for one in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class RoundedCache(KVCache):
    """A cache whose keys and values [B, K, T, D] are rounded on their way in."""

    rounding: Rounding | None = None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.rounding is None:
            return super().extend(layer, keys, values)
        return super().extend(layer, self.rounding(keys), self.rounding(values))
