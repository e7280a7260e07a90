"""Changes of a Core ML package, one place at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from export.coreml.package import RECORD, Package

Change = Callable[[Package], None]


def value(package: Package, function: str, name: str, part: str = "val") -> Any:
    return dict(package.constants(function))[name][part]


def blob(name: str, index: int, flip: int, part: str = "val", function: str = "decode") -> Change:
    """Bits of a byte of a record in the weight file."""

    def change(package: Package) -> None:
        at = value(package, function, name, part).blobFileValue
        path = package.root / at.fileName.removeprefix("@model_path/")
        data = np.memmap(path, np.uint8, "r+")
        start = RECORD.unpack(data[at.offset : at.offset + RECORD.size].tobytes())[3]
        data[start + index] ^= flip
        data.flush()

    return change


def immediate(name: str, factor: float, function: str = "decode") -> Change:
    """A float16 inside the program."""

    def change(package: Package) -> None:
        tensor = value(package, function, name).immediateValue.tensor
        tensor.bytes.values = (np.frombuffer(tensor.bytes.values, np.float16) * factor).astype(np.float16).tobytes()

    return change


def exchanged(first: str, second: str, part: str) -> Change:
    """The records of two constants in each other's place, in one function."""

    def change(package: Package) -> None:
        a, b = (value(package, "decode", name, part).blobFileValue for name in (first, second))
        a.offset, b.offset = b.offset, a.offset

    return change


def operation(name: str, edit: Callable[[Any], None], function: str = "decode") -> Change:
    def change(package: Package) -> None:
        edit(next(op for op in package.operations(function) if op.outputs and op.outputs[0].name == name))

    return change


def kind(new: str) -> Callable[[Any], None]:
    def edit(op: Any) -> None:
        op.type = new

    return edit


def source(argument: str, name: str) -> Callable[[Any], None]:
    def edit(op: Any) -> None:
        op.inputs[argument].arguments[0].name = name

    return edit
