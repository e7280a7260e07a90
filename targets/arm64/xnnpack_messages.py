"""Messages between `XnnpackRuntime` and the child process that holds ExecuTorch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LoadProgram:
    """Load the method `forward` of the program at `path`."""

    path: str
    threads: int = 2


@dataclass(frozen=True)
class ProgramLoaded:
    """Methods of the program."""

    methods: tuple[str, ...]


@dataclass(frozen=True)
class RunTokens:
    """Tokens whose first has position `start`."""

    tokens: list[int]
    start: int


@dataclass(frozen=True)
class TokensRan:
    """logits float32 [tokens, vocab]; of a debug build the stream too, float32 [layers + 1, tokens, hidden]."""

    logits: np.ndarray
    stream: np.ndarray | None = None


@dataclass(frozen=True)
class Time:
    """Decode `count` tokens from position `start`; seconds of each, as seen in the child."""

    start: int
    count: int


@dataclass(frozen=True)
class Timed:
    seconds: tuple[float, ...]


Message = LoadProgram | RunTokens | Time
