"""The methods of choosing codes, by the names that `--method` and recipes take.

An entry holds what can be told without importing the method. The method itself (`compress/methods/protocol.py`) is a
module of its own, imported when it is needed; no other part of the product knows one method from another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from bluelm.errors import InputError

if TYPE_CHECKING:
    from compress.methods.protocol import Method, Options


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        name: in recipes, `--method` and the names of folders.
        title: in plans and reports.
        help: what it is, or is for: a few words behind its name in the help of `--method`.
        path: import path ("package.module:NAME") of its `Method`.
        chooses: False: it stands for codes that a checkpoint came with, and cannot be asked for.
    """

    name: str
    title: str
    help: str
    path: str
    chooses: bool = True


_ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("gptq", "GPTQ", "least loss", "compress.methods.gptq:METHOD"),
        Entry("awq", "AWQ", "scales channels", "compress.methods.awq:METHOD"),
        Entry("awq+gptq", "AWQ+GPTQ", "for models with outlier channels", "compress.methods.awq_gptq:METHOD"),
        Entry("rtn", "RTN", "round to nearest", "compress.methods.rtn:METHOD"),
        Entry("given", "codes as given,", "a quantized checkpoint's own", "compress.methods.given:METHOD", False),
    )
}


def names() -> tuple[str, ...]:
    """The methods that can be asked for."""
    return tuple(name for name, entry in _ENTRIES.items() if entry.chooses)


def all_names() -> tuple[str, ...]:
    """Those, and what stands for codes that are there already."""
    return tuple(_ENTRIES)


def entry(name: str) -> Entry:
    """The entry of a method.

    Raises:
        InputError: there is none; the known ones are listed.
    """
    if name not in _ENTRIES:
        raise InputError(f"unknown method {name!r}", fix=f"known methods: {', '.join(names())}")
    return _ENTRIES[name]


def method(name: str) -> Method[Any]:
    """A method by its name.

    Raises:
        InputError: as `entry`.
    """
    return resolve_name(entry(name).path)


def option_types() -> tuple[type[Options], ...]:
    """The options of all methods, each kind once."""
    kinds = (method(name).options for name in _ENTRIES)
    return tuple(dict.fromkeys(kind for kind in kinds if kind.model_fields))


def help_text() -> str:
    """For the help of `--method`."""
    return f"How codes are chosen: {', '.join(f'{name} ({entry(name).help})' for name in names())}."


@contextmanager
def added(new: Entry) -> Iterator[None]:
    """One more method for as long as the context lasts, e.g. of another distribution."""
    if new.name in _ENTRIES:
        raise InputError(f"there is a method {new.name!r} already", fix="choose another name")
    _ENTRIES[new.name] = new
    try:
        yield
    finally:
        del _ENTRIES[new.name]
