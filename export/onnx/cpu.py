"""ONNX for CPUs: MatMulNBits on 4- and 8-bit weights, float32 activations.

    MatMul(x, W.T)   becomes   x -> MatMulNBits(codes [out, blocks, bytes], scales [out * blocks], zeros)
                                          ^ float16 scales -> Cast

Scales are stored as float16, as the checkpoint has them; the cast to float32 is folded when a session opens.
Where a weight's columns are in another order than its inputs, a Gather puts the inputs in theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from onnx import TensorProto

from bluelm.errors import TargetError
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import CACHES, KvBits
from export.artifacts.package import complete
from export.artifacts.packing import pack
from export.lowering.encoding import Encoding
from export.lowering.ranges import Ranges, int8_cache
from export.onnx.decoder import write_graphs
from export.onnx.graph import OnnxGraph, WeightFile
from export.onnx.ops import OnnxOps, Symbol

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that MatMulNBits has kernels for."""
MASK_VALUE = -10000.0


@dataclass(frozen=True)
class BlockLinear:
    """How MatMulNBits holds a stored weight."""

    rows: int
    bits: int
    block_size: int
    zeros: bool
    exact_scales: bool  # float32 scales, which need no Cast


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    accuracy_level: Literal[0, 4] = 0,
    kv_bits: KvBits = 32,
    ranges: Ranges | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`: prefill.onnx, decode.onnx, weights.bin and what the host needs beside
    them.

    Args:
        accuracy_level: of MatMulNBits. 0 computes in float32 (relative error 3e-7); 4 rounds activations to
            8 bits in blocks (5e-3) and is several times faster.
        kv_bits: width of the KV cache's numbers; 8 bits take their scales from `ranges`.
    """
    with atomic_folder(folder) as temporary:
        if kv_bits == 8 and ranges is not None:
            ranges.save(temporary / "ranges.json")  # what the scales of the cache are held against
        write_graphs(
            temporary,
            quantized.config,
            context,
            chunk,
            MASK_VALUE,
            backend(quantized, accuracy_level, kv_bits, ranges),
            progress or Silent(),
        )
        complete(temporary, "onnx-cpu", quantized, context, chunk, MASK_VALUE, cache=CACHES[kv_bits])
    return Artifact.open(folder)


def backend(
    quantized: QuantizedCheckpoint, accuracy_level: int, kv_bits: KvBits, ranges: Ranges | None
) -> Callable[[OnnxGraph], OnnxOps]:
    """Operations of both graphs, which share weights.

    Raises:
        InputError: 8 bits without ranges, or with another checkpoint's.
    """
    linears: dict[str, BlockLinear] = {}
    orders: dict[str, np.ndarray] = {}
    cache = CacheCodec(kv_bits, ranges, quantized)
    return lambda graph: CpuOps(graph, quantized, accuracy_level, linears, orders, cache)


class CpuOps(OnnxOps):
    """Emits the graph with float32 activations."""

    def __init__(
        self,
        graph: OnnxGraph,
        quantized: QuantizedCheckpoint,
        accuracy_level: int,
        linears: dict[str, BlockLinear],
        orders: dict[str, np.ndarray],
        cache: CacheCodec,
    ) -> None:
        super().__init__(graph)
        self._cache = cache
        self._quantized, self._accuracy_level = quantized, accuracy_level
        self._linears, self._orders = linears, orders  # of both graphs

    def emit(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        shape: Sequence[int],
        encoding: Encoding | None = None,
        **attributes: Any,
    ) -> Symbol:
        self.graph.node(kind, inputs, name, **attributes)
        return Symbol(name, tuple(shape))

    def activation_input(self, name: str, shape: Sequence[int], encoding: Encoding | None = None) -> Symbol:
        self.graph.input(name, TensorProto.FLOAT, shape)
        return Symbol(name, tuple(shape))

    def cache_input(self, name: str, shape: Sequence[int], value: str) -> Symbol:
        self.graph.input(name, self._cache.dtype, shape)
        return Symbol(self._cache.widen(self, name, value, f"{name}.values"), tuple(shape))

    def activation_output(self, x: Symbol, name: str) -> None:
        self.graph.rename(x.name, name)
        self.graph.output(name, TensorProto.FLOAT, x.shape)

    def cache_output(self, x: Symbol, name: str) -> None:
        if self._cache.bits == 32:
            self.activation_output(x, name)
            return
        kind, layer = name.split(".")
        self._cache.narrow(self, x.name, f"layers.{layer}.{kind}", name)
        self.graph.output(name, self._cache.dtype, x.shape)

    def constant(self, array: np.ndarray, name: str) -> Symbol:
        return Symbol(self.graph.initializer(name, array.astype(np.float32)), array.shape)

    def vector(self, name: str) -> Symbol:
        return self.constant(self._quantized.vector(name).numpy(), name)

    def linear(self, x: Symbol, weight: str, name: str) -> Symbol:
        if weight not in self._linears:
            found = self._quantized.ordered(weight)
            self._linears[weight] = store_weight(self.graph.weights, weight, found.weight)
            if found.order is not None:
                self._orders[weight] = found.order.numpy()
        linear = self._linears[weight]
        if weight in self._orders:
            order = self.graph.initializer(f"{weight}.order", self._orders[weight])
            x = self.emit("Gather", [x.name, order], f"{name}.inputs", x.shape, axis=-1)
        inputs = [x.name, self.graph.stored(f"{weight}.codes"), float_scales(self.graph, weight, linear)]
        if linear.zeros:
            inputs.append(self.graph.stored(f"{weight}.zeros"))
        return self.emit(
            "MatMulNBits",
            inputs,
            name,
            (*x.shape[:-1], linear.rows),
            domain="com.microsoft",
            accuracy_level=self._accuracy_level,
            K=x.shape[-1],
            N=linear.rows,
            bits=linear.bits,
            block_size=linear.block_size,
        )

    def rms_norm(self, x: Symbol, weight: str, name: str) -> Symbol:
        gamma = self.constant(self._quantized.vector(weight).numpy(), weight)
        epsilon = self._quantized.config.rms_norm_eps
        return self.emit("RMSNormalization", [x.name, gamma.name], name, x.shape, axis=-1, epsilon=epsilon)

    def masked_softmax(self, scores: Symbol, mask: Symbol, name: str) -> Symbol:
        return self.emit("Softmax", [self.add(scores, mask, f"{name}.masked").name], name, scores.shape, axis=-1)

    def silu(self, x: Symbol, name: str) -> Symbol:
        return self.multiply(x, self.emit("Sigmoid", [x.name], f"{name}.sigmoid", x.shape), name)

    def cached(self, x: Symbol, name: str) -> Symbol:
        if self._cache.bits == 32:
            return x
        narrow = self._cache.narrow(self, x.name, name, f"{name}.codes")
        return Symbol(self._cache.widen(self, narrow, name, name), x.shape)


class CacheCodec:
    """The KV cache's numbers in a float graph: float32 as they are, float16 by Cast, int8 by QuantizeLinear.

    Raises:
        InputError: 8 bits without ranges, or with another checkpoint's.
    """

    def __init__(self, bits: KvBits, ranges: Ranges | None, quantized: QuantizedCheckpoint) -> None:
        self.bits = bits
        self.dtype = {32: TensorProto.FLOAT, 16: TensorProto.FLOAT16, 8: TensorProto.INT8}[bits]
        self._encoding = int8_cache(ranges, quantized) if bits == 8 else None

    def encoding(self, value: str) -> Encoding:
        """int8 encoding of `layers.N.keys` or `layers.N.values`."""
        assert self._encoding is not None
        return self._encoding(value)

    def narrow(self, ops: OnnxOps, source: str, value: str, name: str) -> str:
        """float32 -> what the cache holds."""
        if self.bits == 16:
            ops.graph.node("Cast", [source], name, to=TensorProto.FLOAT16)
        else:
            ops.graph.node("QuantizeLinear", [source, *ops.parameters(self.encoding(value))], name)
        return name

    def widen(self, ops: OnnxOps, source: str, value: str, name: str) -> str:
        """What the cache holds -> float32."""
        if self.bits == 32:
            return source
        if self.bits == 16:
            ops.graph.node("Cast", [source], name, to=TensorProto.FLOAT)
        else:
            ops.graph.node("DequantizeLinear", [source, *ops.parameters(self.encoding(value))], name)
        return name


def float_scales(graph: OnnxGraph, name: str, linear: BlockLinear) -> str:
    """The value in the graph that holds the stored weight's scales as float32."""
    stored = graph.stored(f"{name}.scales")
    if linear.exact_scales:
        return stored
    graph.node("Cast", [stored], f"{stored}.float32", to=TensorProto.FLOAT)
    return f"{stored}.float32"


def store_weight(weights: WeightFile, name: str, tensor: QuantizedTensor) -> BlockLinear:
    """Codes uint8 [out, blocks, block_size * bits / 8], scales float16 [out * blocks] (float32 if they are),
    and zero points if any.

    One scale a row becomes equal scales of blocks of the largest size that divides the row, so no code
    changes. Where none divides it the last block is filled up with zero points, which stand for 0.

    Raises:
        TargetError: several groups a row, of a size that no block divides.
    """
    rows, columns = tensor.shape
    size = tensor.columns_per_group
    if tensor.groups > 1 and size % BLOCKS[-1]:
        fix = f"quantize in groups of a multiple of {BLOCKS[-1]}"
        raise TargetError(f"MatMulNBits does not support groups of {size}", where=name, fix=fix)
    if size not in BLOCKS:
        size = next((block for block in BLOCKS if size % block == 0), BLOCKS[-1])
    blocks = -(-columns // size)
    repeat = -(-tensor.columns_per_group // size)
    scales = tensor.scales.numpy().repeat(repeat, axis=1)  # [out, blocks]
    zeros = tensor.zeros.numpy().repeat(repeat, axis=1)
    codes = np.empty((rows, blocks, size), np.uint8)
    codes[:] = zeros[:, :, None]
    codes.reshape(rows, -1)[:, :columns] = tensor.codes.numpy()
    packed = pack(codes, tensor.bits)
    weights.write(f"{name}.codes", packed, TensorProto.UINT8, packed.shape)
    exact = tensor.scales.dtype == torch.float32
    weights.write(f"{name}.scales", scales, TensorProto.FLOAT if exact else TensorProto.FLOAT16, (rows * blocks,))
    if not tensor.symmetric:
        packed = pack(zeros, tensor.bits)  # a row starts on a byte of its own
        weights.write(f"{name}.zeros", packed, TensorProto.UINT8, (packed.size,))
    return BlockLinear(rows, tensor.bits, size, not tensor.symmetric, exact)
