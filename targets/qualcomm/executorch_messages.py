"""Messages between a process and its child that holds ExecuTorch's Qualcomm backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Method:
    """A method of a program: its name and those of its inputs and outputs, in order."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Pack:
    """Make compiled graphs the methods of one program, the file `path`, for a chip ("SM8650").

    Answer: a `Method` for each, in order. A method's name is its graph's, by which the runtime finds it.
    """

    binaries: tuple[str, ...]
    path: str
    chip: str


@dataclass(frozen=True)
class LoadProgram:
    """Load the methods of the program at `path`."""

    path: str
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class Step:
    """Run a method on inputs by name; the answer is its outputs by name."""

    method: str
    feeds: dict[str, np.ndarray]


@dataclass(frozen=True)
class Describe:
    """What do the compiled graphs of the program at `path` say of themselves? Answer: `Contents` by method."""

    path: str
