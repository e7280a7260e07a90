"""MIL operations that move, pick or make elements without arithmetic on them; entered in the same table."""

from __future__ import annotations

from typing import Any

import numpy as np

from bluelm.errors import InputError
from targets.apple.interpreter.ops import Arguments, Array, Result, op


@op("reshape")
def reshape(a: Arguments) -> Result:
    """To `shape`; -1 is what remains, 0 keeps the dimension at that place."""
    x, shape = a["x"], a.ints("shape", [])
    return x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(shape)])


@op("reshape_like")
def reshape_like(a: Arguments) -> Result:
    """To the dimensions begins[i]:ends[i] of each reference tensor, one after another."""
    shape: list[int] = []
    for reference, begin, end, from_end in zip(
        a["ref_tensors"], a.ints("begins"), a.ints("ends"), a.ints("end_masks"), strict=True
    ):
        shape += reference.shape[begin : None if from_end else end]
    return a["x"].reshape(shape)


@op("transpose")
def transpose(a: Arguments) -> Result:
    """Dimensions in the order `perm`."""
    return np.transpose(a["x"], a.ints("perm"))


@op("expand_dims")
def expand_dims(a: Arguments) -> Result:
    """A dimension of 1 at each of `axes`."""
    return np.expand_dims(a["x"], a.axes() or ())


@op("squeeze")
def squeeze(a: Arguments) -> Result:
    """Without the dimensions of 1 at `axes`, or all of them."""
    return np.squeeze(a["x"], axis=a.axes())


@op("flatten2d")
def flatten2d(a: Arguments) -> Result:
    """To two dimensions, split before `axis`."""
    x, axis = a["x"], a.scalar("axis", 1)
    rows = int(np.prod(x.shape[:axis]))
    return x.reshape(rows, -1)


@op("concat")
def concat(a: Arguments) -> Result:
    """Along `axis`; `interleave` takes one slice of each in turn."""
    axis = a.scalar("axis")
    if a.scalar("interleave", False):
        stacked = np.stack(a["values"], axis=(axis % a["values"][0].ndim) + 1)
        shape = list(a["values"][0].shape)
        shape[axis] *= len(a["values"])
        return stacked.reshape(shape)
    return np.concatenate([np.atleast_1d(v) for v in a["values"]], axis=axis)


@op("stack")
def stack(a: Arguments) -> Result:
    """Along a new `axis`."""
    return np.stack(a["values"], axis=a.scalar("axis"))


@op("split")
def split(a: Arguments) -> Result:
    """Along `axis` into `num_splits` equal parts or parts of `split_sizes`."""
    sizes = a.ints("split_sizes")
    where = a.scalar("num_splits") if sizes is None else np.cumsum(sizes)[:-1].tolist()
    return np.split(a["x"], where, axis=a.scalar("axis"))


@op("tile")
def tile(a: Arguments) -> Result:
    """Repeated `reps` times along each dimension."""
    return np.tile(a["x"], a.ints("reps"))


@op("reverse")
def reverse(a: Arguments) -> Result:
    """Backwards along `axes`."""
    return np.flip(a["x"], a.axes())


@op("pad")
def pad(a: Arguments) -> Result:
    """Padded at the last dimensions: constant, reflect or replicate."""
    x, flat = a["x"], a.ints("pad")
    widths = [(0, 0)] * (x.ndim - len(flat) // 2) + list(zip(flat[::2], flat[1::2], strict=True))
    mode = a.scalar("mode", "constant")
    if mode == "constant":
        return np.pad(x, widths, constant_values=a.scalar("constant_val", 0))
    return np.pad(x, widths, mode="edge" if mode == "replicate" else mode)


@op("band_part")
def band_part(a: Arguments) -> Result:
    """Zero outside a band of `lower` and `upper` diagonals; negative keeps that triangle."""
    x, lower, upper = a["x"], a.scalar("lower", -1), a.scalar("upper", -1)
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    keep = ((lower < 0) | (rows - columns <= lower)) & ((upper < 0) | (columns - rows <= upper))
    return np.where(keep, x, np.zeros((), x.dtype))


@op("fill")
def fill(a: Arguments) -> Result:
    """`shape` full of `value`."""
    return np.full(a.ints("shape"), a.get("value", np.float32(0)))


@op("fill_like")
def fill_like(a: Arguments) -> Result:
    """The shape of `ref_tensor` full of `value`."""
    return np.full(a["ref_tensor"].shape, a.get("value", np.float32(0)))


@op("range_1d")
def range_1d(a: Arguments) -> Result:
    """start, start + step, ... before `end`."""
    return np.arange(a["start"].item(), a["end"].item(), a["step"].item())


@op("shape")
def shape(a: Arguments) -> Result:
    """The dimensions, int32 [rank]."""
    return np.array(a["x"].shape, np.int32)


@op("one_hot")
def one_hot(a: Arguments) -> Result:
    """`on_value` at each index along a new `axis`, `off_value` elsewhere."""
    size, axis = a.scalar("one_hot_vector_size"), a.scalar("axis", -1)
    hit = a["indices"][..., None] == np.arange(size)
    y = np.where(hit, a.get("on_value", np.int32(1)), a.get("off_value", np.int32(0)))
    return np.moveaxis(y, -1, axis)


@op("non_zero")
def non_zero(a: Arguments) -> Result:
    """Indices of what is not zero, int32 [n, rank]."""
    return np.argwhere(a["x"])


@op("topk")
def topk(a: Arguments) -> Result:
    """The k largest (or smallest) along `axis` and their indices; equal ones by position."""
    x, axis, k = a["x"], a.scalar("axis", -1), a.scalar("k", 1)
    order = np.argsort(x if a.scalar("ascending", False) else -x, axis=axis, kind="stable")
    index = np.take(order, range(x.shape[axis] if k == -1 else k), axis=axis)
    values = np.take_along_axis(x, index, axis)
    return [values, index] if a.scalar("return_indices", True) else values


@op("argsort")
def argsort(a: Arguments) -> Result:
    """Indices that sort along `axis`, largest first unless `ascending`."""
    x = a["x"] if a.scalar("ascending", False) else -a["x"]
    return np.argsort(x, axis=a.scalar("axis", -1), kind="stable")


def slices(a: Arguments, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """numpy's index for begin, end, stride and their masks, as slice_by_index and slice_update take them."""
    rank = len(sizes)
    begin, end, stride = a.ints("begin"), a.ints("end"), a.ints("stride", [1] * rank)
    if not len(begin) == len(end) == len(stride) == rank:
        raise InputError(f"bounds of {len(begin)}, {len(end)} and {len(stride)} dimensions for one of {rank}")
    off = [False] * rank
    masks = zip(*(a.ints(f"{m}_mask", off) for m in ("begin", "end", "squeeze")), strict=True)
    index: list[Any] = []
    for i, (no_begin, no_end, squeeze_it) in enumerate(masks):
        if squeeze_it:
            index.append(0 if no_begin else begin[i])
            continue
        index.append(slice(None if no_begin else begin[i], None if no_end else end[i], stride[i]))
    return tuple(index)


@op("slice_by_index")
def slice_by_index(a: Arguments) -> Result:
    """x[begin:end:stride]; masks ignore a bound or drop the dimension."""
    return a["x"][slices(a, a["x"].shape)]


@op("slice_by_size")
def slice_by_size(a: Arguments) -> Result:
    """x[begin : begin + size]; size -1 is up to the end."""
    bounds = list(zip(a.ints("begin"), a.ints("size"), a["x"].shape, strict=True))
    if any(b + s > n for b, s, n in bounds):
        raise InputError(f"a slice of {a.ints('size')} from {a.ints('begin')} on leaves {a['x'].shape}")
    return a["x"][tuple(slice(b, n if s == -1 else b + s) for b, s, n in bounds)]


@op("slice_update")
def slice_update(a: Arguments) -> Result:
    """A copy of x with x[begin:end:stride] replaced by `update`."""
    y, index = a["x"].copy(), slices(a, a["x"].shape)
    if y[index].shape != a["update"].shape:
        raise InputError(f"slice_update: slice {y[index].shape} but update {a['update'].shape}")
    y[index] = a["update"]
    return y


def checked(a: Arguments, indices: Array, size: int, name: str) -> Array:
    """Indices inside [0, size), and [-size, size) where the op set allows it.

    Core ML leaves an index outside undefined; a program that depends on one is wrong, so this raises.
    """
    low = -size if a.opset < 7 else 0
    if indices.size and (indices.min() < low or indices.max() >= size):
        raise InputError(
            f"{name}: index {indices.min()}..{indices.max()} outside 0..{size - 1}",
            fix="Core ML does not define what such an index reads; check the inputs",
        )
    return indices


@op("gather")
def gather(a: Arguments) -> Result:
    """Slices of x along `axis`: x[:axis] + indices[batch_dims:] + x[axis + 1:]."""
    x, batch = a["x"], a.scalar("batch_dims", 0)
    axis = a.scalar("axis", 0) % x.ndim
    indices = checked(a, a["indices"].astype(np.int64), x.shape[axis], "gather")
    if batch == 0:
        return np.take(x, indices, axis=axis)
    flat_x = x.reshape(-1, *x.shape[batch:])
    flat_i = indices.reshape(-1, *indices.shape[batch:])
    parts = [np.take(row, i, axis=axis - batch) for row, i in zip(flat_x, flat_i, strict=True)]
    return np.stack(parts).reshape(*x.shape[:batch], *parts[0].shape)


@op("gather_along_axis")
def gather_along_axis(a: Arguments) -> Result:
    """One element for each index along `axis`."""
    axis = a.scalar("axis", 0)
    indices = checked(a, a["indices"].astype(np.int64), a["x"].shape[axis], "gather_along_axis")
    return np.take_along_axis(a["x"], indices, axis)


@op("gather_nd")
def gather_nd(a: Arguments) -> Result:
    """Slices of x at index tuples in the last dimension of `indices`."""
    x, batch = a["x"], a.scalar("batch_dims", 0)
    indices = a["indices"].astype(np.int64)
    lead = np.indices(indices.shape[:batch])
    tail = (1,) * (indices.ndim - 1 - batch)
    batches = tuple(b.reshape(*b.shape, *tail) for b in lead)
    parts = tuple(np.moveaxis(indices, -1, 0))
    for i, part in enumerate(parts):
        checked(a, part, x.shape[batch + i], "gather_nd")
    return x[batches + parts]


SCATTER = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum,
    "min": np.minimum,
}  # fmt: skip


@op("scatter_nd")
def scatter_nd(a: Arguments) -> Result:
    """A copy of `data` with `updates` put or accumulated at index tuples."""
    y = a["data"].copy()
    parts = np.moveaxis(a["indices"].astype(np.int64), -1, 0)
    for i, part in enumerate(parts):
        checked(a, part, y.shape[i], "scatter_nd")
    mode = a.scalar("mode", "add")
    if mode == "update":
        y[tuple(parts)] = a["updates"]
    else:
        SCATTER[mode].at(y, tuple(parts), a["updates"])
    return y
