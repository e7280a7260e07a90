"""Messages between the two processes of Core AI's runtime."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Open:
    """Load the .aimodel at `path` with caches of `slots`; `norms`: see `coreai_program.prepared`.

    `function`: of a program for lengths of any kind.
    """

    path: str
    function: str
    slots: int
    norms: int


@dataclass(frozen=True)
class Opened:
    """It is loaded."""


@dataclass(frozen=True)
class Step:
    """Take `tokens` behind the first `held` that the states hold.

    `shown`: the stream is asked for. `last`: logits of the last token are enough.
    """

    tokens: list[int]
    held: int
    shown: bool = False
    last: bool = False


@dataclass(frozen=True)
class Stepped:
    """logits float32 [n, vocab], or of some last tokens, where that is enough; the stream float32 [norms, n, hidden],
    where it was asked for."""

    logits: np.ndarray
    stream: np.ndarray | None
