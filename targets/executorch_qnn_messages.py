"""What passes between a process and its child that holds ExecuTorch's Qualcomm backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lower:
    """Lower the quantized checkpoint `source` into the file `path` for a chip ("SM8650"); `debug` shows blocks."""

    source: str
    path: str
    context: int
    chunk: int
    chip: str
    debug: bool = False


@dataclass(frozen=True)
class Lowered:
    """Operators that the NPU did not take, by method; an empty list is wanted."""

    left: dict[str, list[str]]


@dataclass(frozen=True)
class Load:
    """Load both methods of the program at `path`; `layers` of the model."""

    path: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """Run a method on inputs by name; the answer is its outputs by name."""

    method: str
    feeds: dict[str, np.ndarray]
