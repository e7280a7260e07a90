"""Round to nearest: the plain baseline, and what other methods must not do worse than."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.grid import choose_grid
from compress.methods.protocol import Method, Options, SolvingCost, Statistics
from compress.widths.width import Widths


def round_to_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> QuantizedTensor:
    """Each weight to the nearest point of a grid that spans its group's extremes; no search, no calibration.

    Args:
        weight: float32 [out, in].

    Raises:
        InputError: the group size does not divide the columns.
    """
    return choose_grid(weight, bits, group_size, symmetric).nearest(weight)


@dataclass(frozen=True)
class Nearest:
    """Every weight to the nearest point of its grid.

    Attributes:
        hessian: float32 [in, in]: a search of spans weighs errors by it; None: all alike.
    """

    hessian: Tensor | None

    @property
    def note(self) -> Mapping[str, Any]:
        return {}

    def target(self, weight: Tensor, cross: Tensor | None) -> Tensor:
        return weight

    def codes(self, target: Tensor, widths: Widths, search: bool) -> QuantizedTensor:
        bits, size, symmetric = widths.bits, widths.group_size, widths.symmetric
        return choose_grid(target, bits, size, symmetric, search=search, hessian=self.hessian).nearest(target)


class Rtn(Method[Options]):
    """No text, no options; its spans are searched only where the recipe says so."""

    options = Options
    defaults = MappingProxyType({"grid": "minmax"})

    def statistics(self, options: Options) -> Statistics:
        return Statistics()

    def solver(self, hessian: Tensor | None, options: Options) -> Nearest:
        return Nearest(hessian)

    def cost(self, out: int, columns: int, widths: Widths, options: Options) -> SolvingCost:
        return SolvingCost()


METHOD = Rtn()
