"""Where the activations of the whole calibration set lie: in memory, or in memory-mapped files.

A mapped file's pages count as memory of the process as long as it looks at them; `release` gives them back.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor


class Shelf:
    """Makes tensors for activations, all of one dtype.

    Attributes:
        dtype: float32, or bfloat16 for half the room; what is put in is rounded to it.
        folder: where the files are made, which have no name and vanish with the process; None keeps all in RAM.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, folder: Path | None = None) -> None:
        self.dtype, self.folder = dtype, folder
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # each lives as long as its tensor

    @property
    def on_disk(self) -> bool:
        return self.folder is not None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor to be filled, of the shelf's dtype unless another is given.

        Raises:
            OSError: the disk has no room for it. The file is given all of its room now: a write into a map that
                finds the disk full would kill the process.
        """
        if self.folder is None:
            return torch.empty(shape, dtype=dtype or self.dtype)
        dtype = dtype or self.dtype
        size = math.prod(shape) * dtype.itemsize
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self.folder)) from None
            mapped = mmap.mmap(file.fileno(), size)
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def release(self) -> None:
        """Give back the memory of what is on disk; the content stays there."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
