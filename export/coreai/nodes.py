"""What readers of both forms of a Core AI program ask of its nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bluelm.block import Add, Product, Silu
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.onnx.reader import HeldWeight
from export.readback.held import faults
from export.readback.trail import OtherProgramError, Trail

if TYPE_CHECKING:
    from export.coreai.reader import Node


def take(node: Node, op: str, count: int) -> tuple[Node, ...]:
    """The inputs of a node that must be an `op` with `count` of them."""
    if node.op != op or len(node.inputs) != count:
        raise OtherProgramError(f"{node.op} of {len(node.inputs)} values instead of {op} of {count}")
    return node.inputs


def pointwise(step: Silu | Product | Add, node: Node) -> tuple[Node, ...]:
    """What goes value by value into the step that makes a node."""
    match step:
        case Silu():
            return take(node, "silu", 1)
        case Product():
            return take(node, "mul", 2)
        case Add():
            return take(node, "add", 2)


def constant(node: Node) -> np.ndarray:
    """Its numbers."""
    if node.array is None:
        raise OtherProgramError("something computed stands in a constant's place")
    return node.array()


def formed(node: Node, name: str, kind: str, shape: tuple[int | None, ...]) -> None:
    """It must be of these numbers and lengths."""
    if (node.kind, node.shape) != (kind, shape):
        raise OtherProgramError(f"{name} is {node.kind} {node.shape} instead of {kind} {shape}")


class Weights:
    """Holds what a program reads against a quantized checkpoint."""

    def __init__(self, trail: Trail, quantized: QuantizedCheckpoint) -> None:
        self._trail, self._quantized = trail, quantized

    def linear(self, node: Node, name: str, *, kernel: bool = False) -> None:
        """A weight of the checkpoint that a node makes of its codes; `kernel`: of a 1x1 convolution."""
        codes, scales, *nothing = take(node, "blockwise_shift_scale", 4)
        if any(np.any(constant(part)) for part in nothing):
            raise OtherProgramError(f"{name} has zero points")
        if kernel and {codes.shape[2:], scales.shape[2:]} != {(1, 1)}:
            raise OtherProgramError(f"{name} is a kernel of {codes.shape}")
        bits = {"si4": 4, "si8": 8}.get(codes.kind)
        if bits is None or scales.kind != "f16":
            self._trail.see(name, f"codes are {codes.kind}, scales {scales.kind}")
            return
        numbers, factors = (constant(part)[:, :, 0, 0] if kernel else constant(part) for part in (codes, scales))
        self.held(name, numbers, factors, bits, self._quantized.linear(name))

    def held(self, name: str, codes: np.ndarray, scales: np.ndarray, bits: int, wanted: QuantizedTensor) -> None:
        """Signed codes int8 [out, in] and scales float16 [out, groups]."""
        shifted = (np.ascontiguousarray(codes).view(np.uint8) + np.uint8(2 ** (bits - 1))).astype(np.uint8)
        self._trail.see(name, ", ".join(faults(wanted, HeldWeight(shifted, scales, None, bits))))

    def vector(self, name: str, node: Node, shape: tuple[int, ...] = (-1,)) -> None:
        """A vector of the checkpoint in float16."""
        self._trail.array(name, constant(node), self._quantized.vector(name).half().numpy().reshape(shape))
