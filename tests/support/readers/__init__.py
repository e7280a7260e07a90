"""Everything that reads foreign bytes, each with a small valid input to mutate: for fuzzing, here and in benchmarks.

A reader gets a folder in which one file was changed. It may accept it, or raise an ExportError; anything else is a
fault. `allowed` decides.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.support.readers import records, signed, table, words
from tests.support.readers.reader import Reader, allowed, fresh
from tests.support.readers.table import LONG_TO_MAKE

READERS: dict[str, Callable[[], Reader]] = {**table.READERS, **words.READERS, **records.READERS, **signed.READERS}
__all__ = ["LONG_TO_MAKE", "READERS", "Reader", "allowed", "fresh"]
