"""Codes, scales and vectors of a quantized checkpoint as constants of a Core AI program."""

from __future__ import annotations

import numpy as np

from bluelm.errors import TargetError
from compress.checkpoint.quantized import QuantizedTensor
from export.coreai import builder as b
from export.coreai.dialect import Value, ops


class Weight:
    """Codes and scales of a symmetric weight as constants.

    Args:
        kernel: as those of a 1x1 convolution, [out, in, 1, 1]; else [out, in].

    Raises:
        TargetError: the program cannot hold it exactly.
    """

    def __init__(self, weight: QuantizedTensor, name: str, *, kernel: bool = False) -> None:
        check_weight(weight, name)
        codes, scales = weight.signed_codes().numpy(), weight.scales.numpy()
        more = (1, 1) if kernel else ()
        self.codes = b.codes(codes.reshape(*codes.shape, *more), weight.bits, f"{name}.codes")
        self.scales = b.constant(scales.reshape(*scales.shape, *more), f"{name}.scales")
        self._bits, self._groups = weight.bits, (*scales.shape, *more)

    def dequantized(self) -> Value:
        """scale * (code - 0) + 0, float16 [out, in], or that of a kernel."""
        nothing = b.zeros(self._groups, b.signed(self._bits)), b.zeros(self._groups, b.half())
        return ops.blockwise_shift_scale(self.codes, self.scales, *nothing)


def check_weight(weight: QuantizedTensor, name: str) -> None:
    """TargetError unless the program holds the weight exactly."""
    if not weight.symmetric:
        raise TargetError("the program has no zero points for weights", where=name, fix="use a symmetric recipe")
    if str(weight.scales.dtype) != "torch.float16":
        problem = "the program computes in float16, and these scales have more digits"
        raise TargetError(problem, where=name, fix="use --runtime onnx-cpu, or quantize the float checkpoint here")


def half(array: np.ndarray, name: str) -> np.ndarray:
    """A vector as float16.

    Raises:
        TargetError: a number lies beyond it.
    """
    found = array.astype(np.float16)
    if not np.isfinite(found).all():
        raise TargetError("values beyond float16", where=name, fix="use --runtime coreml --activation-bits 32")
    return found
