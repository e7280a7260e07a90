"""Reading the weights of graphs that Qualcomm compiled for HTP: codes and scales, as they lie in the binary.

A matrix [rows, columns] lies in strips of 32 rows, signed codes, found by comparing binaries with what went in:

    4 bits                 [rows/32][columns/8][32][8]      columns 5 7 0 2 4 6 1 3 of each eight, two a byte
    8 bits in groups       [rows/32][columns/4][32][4]      columns 0 2 1 3 of each four
    8 bits, a scale a row  [rows/r][columns/32][r/32][8][32][4]       r of LONG_STRIPS, the last of them fewer
    scales                 [rows/32][groups][32]            float16; those of 8-bit rows are part of other numbers

Strips follow one another, but for gaps behind some rows of large matrices.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from compress.quantized import QuantizedTensor
from export.packing import pack

STRIP, LONG_STRIPS = 32, (256, 64, 128, 512, 1024, 32)  # of 8-bit rows the compiler cuts each graph's as it likes
ORDER_4, ORDER_8 = (5, 7, 0, 2, 4, 6, 1, 3), (0, 2, 1, 3)


@dataclass(frozen=True)
class Answer:
    """What binaries tell of weights.

    Attributes:
        wrong: names of those whose codes or scales are others, or are not there as often as they should be.
        unread: names of those of which nothing can be told: their kind, or their parts, lie in the file in another way.
        folded: names of those whose scales cannot be told.
    """

    wrong: tuple[str, ...]
    unread: tuple[str, ...]
    folded: tuple[str, ...]


def compare(paths: Sequence[Path], weights: Iterable[tuple[str, QuantizedTensor]], copies: int) -> Answer:
    """Look for each weight in the files `paths` of compiled graphs.

    Args:
        copies: how often each must be there, in all files together.
    """
    missing: dict[tuple[int, bool], list[str]] = defaultdict(list)
    known, unread, folded = set[tuple[int, bool]](), list[str](), list[str]()
    with ExitStack() as stack:
        files = [stack.enter_context(_mapped(path)) for path in paths]
        for name, weight in weights:
            if not _regular(weight):
                unread.append(name)
                continue
            kind = weight.bits, weight.groups == 1
            found = 0
            for rows in _cuts(weight):
                found += _count(files, partial(codes, weight, rows), copies - found)
            there = found >= copies
            if there:
                known.add(kind)
            if _long(weight):
                folded.append(name)
            elif there:
                there = _count(files, partial(scales, weight), copies) >= copies
            if not there:
                moved = _long(weight) and all(_count(files, partial(iter, [tile]), 1) for tile in _tiles(weight))
                (unread if moved else missing[kind]).append(name)
    wrong = [name for kind, names in missing.items() if kind in known for name in names]
    unread += [name for kind, names in missing.items() if kind not in known for name in names]
    return Answer(tuple(wrong), tuple(unread), tuple(folded))


def codes(weight: QuantizedTensor, long_strip: int = LONG_STRIPS[0]) -> Iterator[bytes]:
    """The pieces that the codes lie in, in order."""
    rows, columns = weight.shape
    signed = weight.codes.numpy() ^ (1 << (weight.bits - 1))
    if _long(weight):
        for start in range(0, rows, long_strip):
            strips = signed[start : start + long_strip].reshape(-1, STRIP, columns // 32, 8, 4)
            yield np.ascontiguousarray(strips.transpose(2, 0, 3, 1, 4)).tobytes()  # [columns/32][strips][8][32][4]
        return
    order = ORDER_4 if weight.bits == 4 else ORDER_8
    for start in range(0, rows, STRIP):
        strip = signed[start : start + STRIP].reshape(STRIP, -1, len(order))[..., order]
        yield pack(np.ascontiguousarray(strip.transpose(1, 0, 2)), weight.bits).tobytes()  # [columns/n][32][n]


def scales(weight: QuantizedTensor) -> Iterator[bytes]:
    """The pieces that the scales lie in, in order."""
    held = weight.scales.numpy().astype(np.float16)
    for start in range(0, weight.shape[0], STRIP):
        yield np.ascontiguousarray(held[start : start + STRIP].T).tobytes()  # [groups][32]


def _cuts(weight: QuantizedTensor) -> list[int]:
    """Rows of the pieces that the codes may lie in, each giving other bytes."""
    rows, columns = weight.shape
    if not _long(weight) or columns == STRIP:
        return [LONG_STRIPS[0]]
    return list(dict.fromkeys(min(cut, rows) for cut in LONG_STRIPS))


def _tiles(weight: QuantizedTensor) -> Iterator[bytes]:
    """The codes of 8-bit rows, 32 rows by 32 columns at a time."""
    for rows in codes(weight, STRIP):
        yield from (rows[at : at + STRIP * STRIP] for at in range(0, len(rows), STRIP * STRIP))


def _long(weight: QuantizedTensor) -> bool:
    return weight.bits == 8 and weight.groups == 1


def _regular(weight: QuantizedTensor) -> bool:
    """Whether strips are whole."""
    return weight.symmetric and weight.bits in (4, 8) and not any(side % STRIP for side in weight.shape)


def _count(files: Sequence[mmap.mmap], pieces: Callable[[], Iterator[bytes]], enough: int) -> int:
    """How often all pieces lie behind one another; no more than `enough` are looked for."""
    found = 0
    for file in files:
        end = 0
        while found < enough and (end := _follow(file, pieces(), end)) >= 0:
            found += 1
    return found


def _follow(file: mmap.mmap, pieces: Iterator[bytes], start: int) -> int:
    """Where the last of the pieces ends, each found behind the one before it; -1 if one is not there."""
    at = start
    for piece in pieces:
        if file[at : at + len(piece)] != piece:
            at = file.find(piece, at)
            if at < 0:
                return -1
        at += len(piece)
    return at


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
