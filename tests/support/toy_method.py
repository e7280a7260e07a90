"""A toy method as a module of its own: the nearest codes on spans drawn in by a share, behind norms that are doubled.

`ENTRY` is all that the product is told of it; see `compress/methods` and docs/extending/method.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from bluelm.block import block_of
from compress.checkpoint.quantized import QuantizedTensor
from compress.methods import Entry
from compress.methods.grid import Grid, choose_grid, representable
from compress.methods.protocol import FloatBlock, Folded, Method, Options, SolvingCost, Statistics
from compress.widths.width import Widths

ENTRY = Entry("toy", "TOY", "spans drawn in by a share", "tests.support.toy_method:METHOD")


class ToyOptions(Options):
    """What a recipe may set of it.

    Attributes:
        share: of the group's extremes that its codes span.
    """

    section: ClassVar[str] = "toy"

    share: float = Field(default=0.9, gt=0, le=1)


@dataclass(frozen=True)
class ToySolver:
    """Codes for one stage."""

    options: ToyOptions

    @property
    def note(self) -> Mapping[str, Any]:
        return {"share": self.options.share}

    def target(self, weight: Tensor, cross: Tensor | None) -> Tensor:
        return weight

    def codes(self, target: Tensor, widths: Widths, search: bool) -> QuantizedTensor:
        whole = choose_grid(target, widths.bits, widths.group_size, widths.symmetric)
        scales = representable(whole.scales.float() * self.options.share).half()
        return Grid(scales, whole.zeros, widths.bits, widths.group_size).nearest(target)


class Toy(Method[ToyOptions]):
    """Reads the Hessians (a row falls back to rounding where it would lose more), and folds a factor of two."""

    options = ToyOptions

    def statistics(self, options: ToyOptions) -> Statistics:
        return Statistics(inputs=True, float_block=True)

    def fold(self, block: FloatBlock, options: ToyOptions) -> Folded:
        move = block_of(block.config).moves[0]  # between the first norm and the linears that read it
        tensors = dict(block.tensors) | {f"{move.before}.weight": block.tensors[f"{move.before}.weight"] * 2}
        tensors |= {f"{name}.weight": block.tensors[f"{name}.weight"] / 2 for name in move.stage.linears}
        return Folded(tensors, {move.stage.name: {"factor": 2}}, frozenset())

    def solver(self, hessian: Tensor | None, options: ToyOptions) -> ToySolver:
        return ToySolver(options)

    def cost(self, out: int, columns: int, widths: Widths, options: ToyOptions) -> SolvingCost:
        return SolvingCost(operations=4 * out * columns**2)  # both losses


METHOD = Toy()
