"""Flatbuffers that somebody else wrote, read by the Python classes of their schema within bounds.

Many references may lead to one table, and a table's vectors to one another's: the square of what a file holds is
visited, which flatbuffers' Verifier in C++ bounds, and its Python does not
(https://flatbuffers.dev/languages/cpp/#access-of-untrusted-buffers). Here each visit is counted.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import flatbuffers.table

Read = TypeVar("Read")
MOST_TABLES = 200_000  # a program of 80 blocks has a third
SHARED = 4  # times that a byte may be visited
_NOT_TABLES = (ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError, struct.error)
_Table: Any = flatbuffers.table.Table
_one_at_a_time = threading.RLock()


def read_tables(read: Callable[[], Read], size: int) -> Read:
    """What `read` makes of a flatbuffer of so many bytes, by the generated classes.

    Raises:
        ValueError: it leads out of the file, or tables and bytes are visited more often than the bounds above.
    """
    with _counted(SHARED * size + (1 << 16)):
        try:
            return read()
        except _NOT_TABLES as error:
            raise ValueError(f"its tables cannot be followed: {error}") from None


@contextmanager
def _counted(most_bytes: int) -> Iterator[None]:
    """The classes make a `Table` of each that they come to; in this thread these are counted."""
    thread, left = threading.get_ident(), [MOST_TABLES, most_bytes]

    def visit(kind: int, count: int) -> None:
        if threading.get_ident() == thread:
            left[kind] -= count
            if left[kind] < 0:
                raise ValueError("it leads to the same places too often")

    def begin(table: Any, buffer: Any, place: int) -> None:
        visit(0, 1)
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
