"""Reading the weights of a .pte for HTP back: the float16 numbers that codes and scales stand for.

The delegate's graph says nothing of them, but its bytes hold every matrix [rows, columns] whole, in tiles of 32 by 32:
[rows / 32, columns / 32, 16 pairs of columns, 32 rows, 2].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from compress.store import QuantizedCheckpoint
from export.executorch_reader import read_file

TILE = 32
WORDS = 64  # of eight bytes, compared one by one before a whole matrix is


def missing(path: Path, quantized: QuantizedCheckpoint, names: Sequence[str]) -> Iterator[str]:
    """Which of the linears `names` the .pte does not hold once for each method, each number as float16 has it.

    Where no matrix of a shape lies in tiles, the compiler chose another order for it: then each of its numbers must
    be in the file as often as in the checkpoint, and the answers speak for the order.
    """
    program = read_file(path).program
    plans = program.execution_plan
    blobs = {delegate.processed.index for plan in plans for delegate in plan.delegates}  # methods may share one
    data = b"".join(bytes(program.backend_delegate_data[index].data) for index in sorted(blobs))
    words = np.frombuffer(data, np.uint64, len(data) // 8)
    left = _counts(np.frombuffer(data, np.uint16, len(data) // 2))
    known, others = set[tuple[int, ...]](), dict[str, tuple[int, ...]]()
    wanted = np.zeros_like(left)
    for name in names:
        matrix = quantized.linear(name).dequantize().half().numpy()  # [rows, columns]
        counts = len(plans) * _counts(matrix.view(np.uint16).ravel())
        if _places(words, matrix) >= len(plans):
            known.add(matrix.shape)
            left -= counts
        else:
            others[name] = matrix.shape
            wanted += counts
    lacking = bool((wanted > left).any())
    yield from (name for name, shape in others.items() if shape in known or lacking)


def tiled(matrix: np.ndarray) -> np.ndarray:
    """float16 [rows, columns] -> [rows / 32, columns / 32, 16, 32, 2]; both are multiples of 32."""
    rows, columns = matrix.shape
    tiles = matrix.reshape(rows // TILE, TILE, columns // TILE, TILE // 2, 2)
    return np.ascontiguousarray(tiles.transpose(0, 2, 3, 1, 4))


def _places(words: np.ndarray, matrix: np.ndarray) -> int:
    """How often the matrix lies in `words`, uint64 [n], in tiles."""
    if any(side % TILE for side in matrix.shape):
        return 0
    sought = tiled(matrix).ravel().view(np.uint64)
    places = np.flatnonzero(words[: max(0, len(words) - len(sought) + 1)] == sought[0])
    for offset in range(1, WORDS):
        places = places[words[places + offset] == sought[offset]]
    return sum(np.array_equal(words[place : place + len(sought)], sought) for place in places)


def _counts(numbers: np.ndarray) -> np.ndarray:
    """How often each of the 65,536 float16 numbers is there: int64 [65536]."""
    return np.bincount(numbers, minlength=2**16)
