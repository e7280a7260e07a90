"""Codes that a checkpoint came with: nothing is chosen, and they take no more than storing them."""

from __future__ import annotations

from torch import Tensor

from bluelm.errors import InputError
from compress.methods.protocol import Method, Options, Solver, SolvingCost, Statistics
from compress.widths.width import Widths


class Given(Method[Options]):
    """See `compress/formats/adopt.py` for how they are taken over."""

    options = Options

    def statistics(self, options: Options) -> Statistics:
        return Statistics()

    def solver(self, hessian: Tensor | None, options: Options) -> Solver:
        raise InputError("this recipe describes codes that a checkpoint came with", fix="give a recipe with a method")

    def cost(self, out: int, columns: int, widths: Widths, options: Options) -> SolvingCost:
        return SolvingCost()


METHOD = Given()
