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
    """Methods of the program and the delegates that it needs."""

    methods: tuple[str, ...]
    backends: tuple[str, ...]


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
class Generate:
    """Greedy generation by ExecuTorch's own `TextLLMRunner`: `prompt` is text, for the tokenizer at
    `tokenizer`; `bos`: how many bos tokens stand in front of it, 0 or 1."""

    path: str
    tokenizer: str
    prompt: str
    count: int
    bos: int


@dataclass(frozen=True)
class Generated:
    """What the runner said, piece by piece."""

    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Time:
    """Decode `count` tokens from position `start`; seconds of each, as seen in the child."""

    start: int
    count: int


@dataclass(frozen=True)
class Timed:
    seconds: tuple[float, ...]


Message = LoadProgram | RunTokens | Generate | Time
