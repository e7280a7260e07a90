"""Freed memory, given back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Let glibc return what was freed; elsewhere the allocator decides.

    It keeps freed blocks of up to 32 MB for later ones of their size. Behind the sums of a wide layer, which come in
    such blocks, that is half a GB that counts as the process's until it ends.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
