"""Comparing the numbers of a constant, bit for bit."""

from __future__ import annotations

import numpy as np


def array_fault(found: np.ndarray | None, wanted: np.ndarray) -> str:
    """How two arrays differ in type, shape or bits; "" if they do not. None: there is no constant."""
    if found is None:
        return "is no constant"
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"{found.dtype.name} {list(found.shape)} instead of {wanted.dtype.name} {list(wanted.shape)}"
    if found.tobytes() == wanted.tobytes():
        return ""
    mine, theirs = (np.ascontiguousarray(np.atleast_1d(array)) for array in (found, wanted))
    bits = f"u{mine.dtype.itemsize}"
    apart = mine.view(bits) != theirs.view(bits)
    first = tuple(np.argwhere(apart)[0].tolist())
    return (
        f"{mine[first]:.9g} instead of {theirs[first]:.9g} at {list(first)}; {int(apart.sum())} of {apart.size} differ"
    )
