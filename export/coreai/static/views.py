"""Which numbers of another value a value shows, where it only cuts, turns or reshapes that.

Apple's package rewrites such operations: it merges them, and makes reshapes of transpositions where it can. So a chain
of them is not compared by its operations but by what comes of it: numpy does the same to an array that has offsets and
strides and no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import as_strided

from export.coreai.nodes import constant, take
from export.readback.trail import OtherProgramError

if TYPE_CHECKING:
    from export.coreai.reader import Node

View = np.ndarray
Change = Callable[[View], View]
SHAPED = ("reshape", "expand_dims", "shrink_dims")
KEPT = ("copy_with_constraints", "copy_discarding_constraints")
_NOWHERE = np.zeros(1, np.int8)


def unchanged(view: View) -> View:
    """All numbers in their order, whatever the shape."""
    return view


def shown(node: Node, change: Change, what: str) -> Node:
    """The value that a node shows, which must be all of it, changed so; axes of length 1 do not matter."""
    base, found = _followed(node)
    _alike(found, _whole(base), change, what)
    return base


def same(node: Node, other: Node, change: Change, what: str) -> None:
    """A node must show what another one shows, changed so."""
    (base, found), (wanted, view) = _followed(node), _followed(other)
    if base is not wanted:
        raise OtherProgramError(f"{what} is another value")
    _alike(found, view, change, what)


def _alike(found: View, view: View, change: Change, what: str) -> None:
    wanted = change(view)
    shaped = change is unchanged or _axes(found) == _axes(wanted)
    if not shaped or _places(found) != _places(wanted):
        raise OtherProgramError(f"{what} is another part, or otherwise turned")


def _followed(node: Node) -> tuple[Node, View]:
    """The first value that is computed, and what the node shows of it."""
    if node.op in SHAPED:
        base, view = _followed(take(node, node.op, 2)[0])
        return base, _shaped(view, node)
    if node.op == "transpose":
        x, order = take(node, "transpose", 2)
        base, view = _followed(x)
        return base, view.transpose(constant(order).tolist())
    if node.op == "slice":
        x, *bounds = take(node, "slice", 4)
        base, view = _followed(x)
        return base, view[tuple(map(slice, *(constant(one).tolist() for one in bounds)))]
    if node.op in KEPT:
        return _followed(take(node, node.op, 1)[0])
    return node, _whole(node)


def _whole(node: Node) -> View:
    """An array of bytes, one a number, that lie nowhere."""
    shape = [size or 0 for size in node.shape]
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    return as_strided(_NOWHERE, shape, strides)


def _shaped(view: View, node: Node) -> View:
    try:
        return np.reshape(view, [size or 0 for size in node.shape], copy=False)
    except ValueError:
        raise OtherProgramError(f"numbers are put into another order by a {node.op} to {node.shape}") from None


def _axes(view: View) -> list[int]:
    return [size for size in view.shape if size != 1]


def _places(view: View) -> tuple[int, list[tuple[int, int]]]:
    """Where the first number lies, and lengths and strides of axes; those that follow on each other are one."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        if axes and size != 1 and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        elif size != 1:
            axes.append((size, stride))
    return view.__array_interface__["data"][0] - _NOWHERE.__array_interface__["data"][0], axes
