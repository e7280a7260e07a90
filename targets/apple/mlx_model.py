"""mlx-lm's own model of a folder, as it is computed on this machine.

MLX's CPU kernels are some thirty times slower in float16 than in float32, so there every weight is widened to float32
as MLX reads it, and the stream is rounded to float16 behind each block, as Metal stores it: values beyond float16
become infinite on both.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model

from bluelm.errors import UnavailableError

Model = Any  # of mlx-lm, which has no annotations


def choose(unit: str) -> None:
    """Compute on the `cpu` or on a Mac's `gpu` from now on.

    Raises:
        UnavailableError: there is no GPU of MLX's here.
    """
    if unit == "gpu" and sys.platform != "darwin":
        raise UnavailableError("MLX's GPU is a Mac's", fix="leave it to the CPU here, or run on a Mac")
    mx.set_default_device(mx.Device(mx.gpu if unit == "gpu" else mx.cpu))


def prepared(model: Model, unit: str) -> Model:
    """The model as it is on a GPU; on a CPU the same numbers in float32, with float16 between its blocks."""
    if unit != "gpu":
        model.set_dtype(mx.float32)
        model = dequantize_model(model)
        model.model.layers = [_Stored(layer) for layer in model.model.layers]
    mx.eval(model.parameters())  # what waits to be computed belongs to this thread alone
    return model


class _Stored(nn.Module):
    """A block whose output is stored as float16."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __call__(self, *arguments: Any, **more: Any) -> mx.array:
        made: Any = self.block(*arguments, **more)
        return made.astype(mx.float16).astype(mx.float32)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "block" else getattr(self.block, name)
