"""MIL's constexpr operations: weights that a package holds compressed. Entered in the same table.

The interpreter hands them the raw constants (integers as stored, floats as float32).
"""

from __future__ import annotations

import math

import numpy as np

from export.coreml.package import unpack_bits
from targets.apple.interpreter.ops import Arguments, Array, Result, op


def spread(values: Array, shape: tuple[int, ...]) -> Array:
    """Repeat each element over its block until `values` has `shape` (same rank)."""
    for axis, (have, want) in enumerate(zip(values.shape, shape, strict=True)):
        if have not in (1, want):
            values = np.repeat(values, want // have, axis)
    return values


@op("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(a: Arguments) -> Result:
    """scale * (data - offset), one scale and offset a block."""
    data = a["data"].astype(np.float32)
    if "offset" in a:
        data = data - spread(a["offset"].astype(np.float32), data.shape)
    return data * spread(a["scale"], data.shape)


@op("constexpr_affine_dequantize")
def affine_dequantize(a: Arguments) -> Result:
    """scale * (quantized_data - zero_point) along `axis` (iOS 16)."""
    data = a["quantized_data"].astype(np.float32)
    shape = [1] * data.ndim
    shape[a.scalar("axis")] = -1
    scale, zero = (
        v.astype(np.float32) if v.ndim == 0 else v.astype(np.float32).reshape(shape)
        for v in (a["scale"], a["zero_point"])
    )
    return scale * (data - zero)


@op("constexpr_cast")
def constexpr_cast(a: Arguments) -> Result:
    """The constant in another type: the declared one."""
    return a["source_val"]


@op("constexpr_lut_to_dense")
def lut_to_dense(a: Arguments) -> Result:
    """Palettized weights: lut [groups..., palettes, vector] (iOS 18) or one flat palette (iOS 16)."""
    lut = a["lut"]
    if "shape" in a:  # iOS 16: packed indices, lut [palettes]
        shape, bits = a.ints("shape"), int(math.log2(lut.size))
        count = math.prod(shape)
        packed = a["indices"]
        indices = packed if bits == 8 else unpack_bits(packed, f"uint{bits}", count)
        return lut[indices[:count]].reshape(shape)
    indices = a["indices"].astype(np.int64)
    blocks = [np.arange(n) // (n // g) for n, g in zip(indices.shape, lut.shape, strict=False)]
    vectors = lut[(*np.ix_(*blocks), indices)]  # [*indices, vector]
    if lut.shape[-1] == 1:
        return vectors[..., 0]
    axis = a.scalar("vector_axis") % indices.ndim
    shape = list(indices.shape)
    shape[axis] *= lut.shape[-1]
    return np.moveaxis(vectors, -1, axis + 1).reshape(shape)


@op("constexpr_sparse_to_dense")
def sparse_to_dense(a: Arguments) -> Result:
    """Nonzero elements put where the mask is 1; iOS 16 packs the mask and names the shape."""
    mask = a["mask"]
    if "shape" in a:
        shape = a.ints("shape")
        mask = unpack_bits(mask, "uint1", math.prod(shape)).reshape(shape)
    dense = np.zeros(mask.shape, a["nonzero_data"].dtype)
    dense[mask != 0] = a["nonzero_data"]
    return dense
