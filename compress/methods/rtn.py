"""Round to nearest: the plain baseline, and what other methods must not do worse than."""

from __future__ import annotations

from torch import Tensor

from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.grid import choose_grid


def round_to_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> QuantizedTensor:
    """Each weight to the nearest point of a grid that spans its group's extremes; no search, no calibration.

    Args:
        weight: float32 [out, in].

    Raises:
        InputError: the group size does not divide the columns.
    """
    return choose_grid(weight, bits, group_size, symmetric).nearest(weight)
