"""The child process that holds ExecuTorch's runtime."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from bluelm.errors import InputError
from targets.arm64.program import load_program, methods
from targets.arm64.xnnpack_messages import (
    LoadProgram,
    Message,
    ProgramLoaded,
    RunTokens,
    Time,
    Timed,
    TokensRan,
)
from targets.host.child import serve

_loaded: dict[str, tuple[Any, Any]] = {}  # program, method


def handle(message: Message) -> ProgramLoaded | TokensRan | Timed:
    """Do what a message asks."""
    if isinstance(message, LoadProgram):
        return _load(message)
    if isinstance(message, Time):
        return _time(message)
    assert isinstance(message, RunTokens)
    logits, *stream = _run(message.tokens, message.start)
    return TokensRan(logits[0].numpy().copy(), stream[0].numpy().copy() if stream else None)


def _load(message: LoadProgram) -> ProgramLoaded:
    torch.set_num_threads(message.threads)
    try:
        program = load_program(message.path)
        method = program.load_method("forward")
    except RuntimeError as error:
        raise InputError(f"ExecuTorch cannot load the program: {error}", where=message.path) from None
    _loaded["forward"] = program, method
    return ProgramLoaded(tuple(sorted(methods(program))))


def _run(tokens: list[int], start: int) -> Sequence[torch.Tensor]:
    """Outputs: logits [1, tokens, vocab], and of a debug build the stream [layers + 1, tokens, hidden]."""
    _, method = _loaded["forward"]
    return method([torch.tensor([tokens]), torch.tensor([start])])


def _time(message: Time) -> Timed:
    seconds: list[float] = []
    for position in range(message.start, message.start + message.count):
        begin = time.perf_counter()
        _run([5], position)
        seconds.append(time.perf_counter() - begin)
    return Timed(tuple(seconds))


if __name__ == "__main__":
    serve(handle, sys.argv)
