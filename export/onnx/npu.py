"""ONNX for NPUs: integer weights behind DequantizeLinear, every activation in 16-bit codes.

    MatMul(x, W.T)   becomes   x -> MatMul -> QuantizeLinear -> DequantizeLinear
                                     ^
                 int4 codes [in, out] -> DequantizeLinear(scales [in / group, out], axis=0, block_size=group)

and likewise each other operation gets a quantize pair behind it; a compiler folds the pairs away and
computes on codes. RMSNorm is split: HTP takes only an 8-bit gamma, which loses more than all other
activations together, so it gets a gamma of ones and a multiplication by the real gamma in 16 bits follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from bluelm.block import block_of
from bluelm.errors import TargetError
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED, HEAD, LinearInfo, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.package import complete
from export.artifacts.packing import pack
from export.lowering.encoding import SHARE, Encoding
from export.lowering.parts import split, whole
from export.lowering.ranges import Ranges
from export.onnx.decoder import write_graphs
from export.onnx.graph import OnnxGraph, WeightFile
from export.onnx.ops import OnnxOps, Symbol

TYPES = {
    "uint16": TensorProto.UINT16,
    "int16": TensorProto.INT16,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
}
ONE = 128
"""The uint8 code of a gamma of ones, at scale 1/128: exactly 1."""


@dataclass(frozen=True)
class DequantizedLinear:
    """How a stored weight is dequantized."""

    rows: int
    attributes: dict[str, Any]


def export(
    quantized: QuantizedCheckpoint,
    ranges: Ranges,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    part_bytes: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`: prefill.onnx, decode.onnx, weights.bin and what the host needs beside
    them.

    Args:
        part_bytes: most bytes of weights in one part; None: one part, whatever its size.

    Raises:
        InputError: `ranges` are another checkpoint's.
        TargetError: a weight has zero points, or a block or the head alone is larger than `part_bytes`.
    """
    ranges.check(quantized)
    parts = [whole(quantized.config.num_layers)]
    if part_bytes is not None:
        parts = split(0, *weight_sizes(quantized), part_bytes)
    with atomic_folder(folder) as temporary:
        write_graphs(
            temporary,
            quantized.config,
            context,
            chunk,
            ranges.mask_value,
            backend(quantized, ranges),
            progress or Silent(),
            parts,
        )
        ranges.save(temporary / "ranges.json")
        cache = "int16" if ranges.cache_bits == 16 else "int8"
        complete(temporary, "onnx-npu", quantized, context, chunk, ranges.mask_value, len(parts), cache)
    return Artifact.open(folder)


def backend(quantized: QuantizedCheckpoint, ranges: Ranges) -> Callable[[OnnxGraph], OnnxOps]:
    """Operations of all graphs, which share weights."""
    linears: dict[str, DequantizedLinear] = {}
    return lambda graph: NpuOps(graph, quantized, ranges, linears)


class NpuOps(OnnxOps):
    """Emits the quantized graph; `ranges` give the encoding of each value."""

    def __init__(
        self,
        graph: OnnxGraph,
        quantized: QuantizedCheckpoint,
        ranges: Ranges,
        linears: dict[str, DequantizedLinear],
    ) -> None:
        super().__init__(graph)
        self._quantized, self._ranges, self._linears = quantized, ranges, linears

    def emit(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        shape: Sequence[int],
        encoding: Encoding | None = None,
        **attributes: Any,
    ) -> Symbol:
        self.graph.node(kind, inputs, f"{name}.exact", **attributes)
        return self._pair(f"{name}.exact", name, shape, encoding or self._ranges.encoding(name))

    def activation_input(self, name: str, shape: Sequence[int], encoding: Encoding | None = None) -> Symbol:
        self.graph.input(name, TensorProto.FLOAT, shape)
        return self._pair(name, f"{name}.values", shape, encoding or self._ranges.encoding(name))

    def cache_input(self, name: str, shape: Sequence[int], value: str) -> Symbol:
        encoding = self._ranges.cache_encoding(value)
        self.graph.input(name, TYPES[encoding.dtype], shape)
        return self._dequantize(name, f"{name}.values", shape, encoding)

    def activation_output(self, x: Symbol, name: str) -> None:
        self.graph.rename(x.name, name)
        self.graph.output(name, TensorProto.FLOAT, x.shape)

    def cache_output(self, x: Symbol, name: str) -> None:
        assert x.encoding is not None
        self.graph.rename(f"{x.name}.codes", name)
        self.graph.output(name, TYPES[x.encoding.dtype], x.shape)

    def constant(self, array: np.ndarray, name: str) -> Symbol:
        encoding = Encoding.of_range(float(array.min()), float(array.max()))
        codes = self.graph.initializer(f"{name}.codes", encoding.quantize(array))
        return self._dequantize(codes, f"{name}.values", array.shape, encoding)

    def vector(self, name: str) -> Symbol:
        return self.constant(self._quantized.vector(name).numpy(), name)

    def linear(self, x: Symbol, weight: str, name: str) -> Symbol:
        if weight not in self._linears:
            self._linears[weight] = store_weight(self.graph.weights, weight, self._quantized.linear(weight))
        linear = self._linears[weight]
        inputs = [self.graph.stored(f"{weight}.codes"), self.graph.stored(f"{weight}.scales")]
        self.graph.node("DequantizeLinear", inputs, weight, **linear.attributes)
        return self.emit("MatMul", [x.name, weight], name, (*x.shape[:-1], linear.rows))

    def rms_norm(self, x: Symbol, weight: str, name: str) -> Symbol:
        width = x.shape[-1]
        name_of_ones = "ones.codes" if width == self._quantized.config.hidden_size else f"ones.{width}.codes"
        ones = [
            self.graph.initializer(name_of_ones, np.full(width, ONE, np.uint8)),
            self.graph.initializer("ones.scale", np.array(1 / ONE, np.float32)),
            self.graph.initializer("ones.zero", np.array(0, np.uint8)),
        ]
        self.graph.node("DequantizeLinear", ones, f"{name}.ones")
        epsilon = self._quantized.config.rms_norm_eps
        inputs = [x.name, f"{name}.ones"]
        unit = self.emit("RMSNormalization", inputs, f"{name}.unit", x.shape, axis=-1, epsilon=epsilon)
        gamma = self._quantized.vector(weight).numpy()
        return self.multiply(unit, self.constant(gamma, weight), name)

    def masked_softmax(self, scores: Symbol, mask: Symbol, name: str) -> Symbol:
        masked = self.add(scores, mask, f"{name}.masked")
        return self.emit("Softmax", [masked.name], name, scores.shape, SHARE, axis=-1)

    def silu(self, x: Symbol, name: str) -> Symbol:
        gate = self.emit("Sigmoid", [x.name], f"{name}.sigmoid", x.shape, SHARE)
        return self.multiply(x, gate, name)

    def cached(self, x: Symbol, name: str) -> Symbol:
        return self._pair(x.name, name, x.shape, self._ranges.cache_encoding(name))

    def _pair(self, source: str, name: str, shape: Sequence[int], encoding: Encoding) -> Symbol:
        """`source` to codes `<name>.codes` and back to `name`."""
        self.graph.node("QuantizeLinear", [source, *self.parameters(encoding)], f"{name}.codes")
        return self._dequantize(f"{name}.codes", name, shape, encoding)

    def _dequantize(self, codes: str, name: str, shape: Sequence[int], encoding: Encoding) -> Symbol:
        self.graph.node("DequantizeLinear", [codes, *self.parameters(encoding)], name)
        return Symbol(name, tuple(shape), encoding)


def weight_sizes(quantized: QuantizedCheckpoint) -> tuple[list[int], int]:
    """Bytes of the weights of each block, and of the head, as they are stored."""

    def stored(info: LinearInfo) -> int:
        rows, columns = info.shape
        groups = 1 if info.group_size == -1 else columns // info.group_size
        return rows * columns * info.bits // 8 + 4 * rows * groups

    held, layers = quantized.linears, range(quantized.config.num_layers)
    linears = block_of(quantized.config).linears
    blocks = [sum(stored(held[f"model.layers.{layer}.{name}"]) for name in linears) for layer in layers]
    return blocks, stored(held[EMBED if quantized.config.shares_table else HEAD])


def store_weight(weights: WeightFile, name: str, tensor: QuantizedTensor) -> DequantizedLinear:
    """Signed codes [in, out] (int4: two a byte), float32 scales [in / group, out], or [out] for 8-bit rows.

    A 4-bit row with one scale is one block: with a scale an axis HTP is several times less exact on short
    rows, and without zero points reads its codes as unsigned.

    Raises:
        TargetError: zero points; HTP compiles int4 blocks that have them and then ignores them.
    """
    if not tensor.symmetric:
        raise TargetError("the NPU computes wrongly with zero points", where=name, fix="quantize with --symmetric")
    rows, columns = tensor.shape
    scales = tensor.scales.float().numpy().T  # [groups, out]
    if tensor.bits == 4:
        signed = (tensor.codes.numpy() ^ 8).T  # [in, out]; code - 8 in two's complement of 4 bits
        weights.write(f"{name}.codes", pack(signed.reshape(-1), 4), TensorProto.INT4, (columns, rows))
    else:
        signed = (tensor.codes.numpy() ^ 128).T  # code - 128
        weights.write(f"{name}.codes", signed, TensorProto.INT8, (columns, rows))
    if tensor.bits == 8 and tensor.groups == 1:
        weights.write(f"{name}.scales", scales[0], TensorProto.FLOAT, (rows,))
        return DequantizedLinear(rows, {"axis": 1})
    weights.write(f"{name}.scales", scales, TensorProto.FLOAT, scales.shape)
    return DequantizedLinear(rows, {"axis": 0, "block_size": tensor.columns_per_group})
