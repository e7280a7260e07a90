"""Flatbuffers from untrusted files, read by the Python classes of their schema within bounds.

Many references may point to one table, and the vectors of tables to each other's tables: then the square of what a file
holds is visited. Flatbuffers' Verifier in C++ bounds that, its Python does not
(https://flatbuffers.dev/languages/cpp/#access-of-untrusted-buffers). Here every visit is counted, in all and by place.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import flatbuffers.table

Read = TypeVar("Read")
MOST_TABLES = 100_000  # visits; a program of 80 blocks takes 67,000, two of each table
TABLES, TABLES_OF_A_BLOCK = 10_000, 3_000  # visits at most; Llama's are 300 and 840
SAME_PLACE = 16  # visits of one table
SHARED = 4  # times that a byte may be visited
_NOT_TABLES = (ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError, struct.error)
_Table: Any = flatbuffers.table.Table
_one_at_a_time = threading.RLock()


def read_tables(read: Callable[[], Read], size: int, blocks: int | None = None) -> Read:
    """What `read` makes of a flatbuffer of so many bytes, by the generated classes.

    Args:
        blocks: how many it may hold of a model's, which bounds what is read; None where nobody knows.

    Raises:
        ValueError: it leads out of the file, or tables and bytes are visited more often than the bounds above.
    """
    most = MOST_TABLES if blocks is None else min(MOST_TABLES, TABLES + TABLES_OF_A_BLOCK * blocks)
    with _counted(most, SHARED * size + (1 << 16)):
        try:
            return read()
        except _NOT_TABLES as error:
            raise ValueError(f"its tables cannot be followed: {error}") from None


@contextmanager
def _counted(most_tables: int, most_bytes: int) -> Iterator[None]:
    """The schema's classes make a `Table` for each one that they visit; in this thread these are counted."""
    thread, left, places = threading.get_ident(), [most_tables, most_bytes], Counter[int]()

    def visit(kind: int, count: int) -> None:
        if threading.get_ident() == thread:
            left[kind] -= count
            if left[kind] < 0:
                raise ValueError("it holds too many tables, or leads to the same places too often")

    def begin(table: Any, buffer: Any, place: int) -> None:
        visit(0, 1)
        places[place] += bool(place)  # 0: of a union, whose place is not known yet
        if places[place] > SAME_PLACE:
            raise ValueError("it leads to one table too often")
        plain["__init__"](table, buffer, place)

    def text(table: Any, place: int) -> bytes:
        found = plain["String"](table, place)
        visit(1, len(found))
        return found

    def length(table: Any, place: int) -> int:
        count = plain["VectorLen"](table, place)
        visit(1, count)  # an element takes a byte at least
        return count

    with _one_at_a_time:
        plain = {name: getattr(_Table, name) for name in ("__init__", "String", "VectorLen")}
        try:
            _Table.__init__, _Table.String, _Table.VectorLen = begin, text, length
            yield
        finally:
            for name, method in plain.items():
                setattr(_Table, name, method)
