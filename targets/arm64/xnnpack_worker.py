"""The child process that holds ExecuTorch's runtime and its LLM runner."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the attention operators)
from executorch.kernels import quantized  # noqa: F401  (registers the embedding operator)
from executorch.runtime import Method, Program, Runtime, Verification

from bluelm.errors import InputError
from targets.arm64.xnnpack_messages import (
    Generate,
    Generated,
    LoadProgram,
    Message,
    ProgramLoaded,
    RunTokens,
    Time,
    Timed,
    TokensRan,
)
from targets.host.child import serve

_loaded: dict[str, tuple[Program, Method]] = {}


def handle(message: Message) -> ProgramLoaded | TokensRan | Generated | Timed:
    """Do what a message asks."""
    if isinstance(message, LoadProgram):
        return _load(message)
    if isinstance(message, Generate):
        return _generate(message)
    if isinstance(message, Time):
        return _time(message)
    assert isinstance(message, RunTokens)
    logits, *stream = _run(message.tokens, message.start)
    return TokensRan(logits[0].numpy().copy(), stream[0].numpy().copy() if stream else None)


def _load(message: LoadProgram) -> ProgramLoaded:
    torch.set_num_threads(message.threads)
    try:
        program = Runtime.get().load_program(message.path, verification=Verification.InternalConsistency)
        method = program.load_method("forward")
    except RuntimeError as error:
        raise InputError(f"ExecuTorch cannot load the program: {error}", where=message.path) from None
    if method is None:
        raise InputError("the program has no method 'forward'", where=message.path)
    _loaded["forward"] = program, method
    names = method.metadata.backend_names() if hasattr(method.metadata, "backend_names") else ()
    return ProgramLoaded(tuple(sorted(program.method_names)), tuple(names))


def _run(tokens: list[int], start: int) -> Sequence[torch.Tensor]:
    """Outputs: logits [1, tokens, vocab], and of a debug build the stream [layers + 1, tokens, hidden]."""
    _, method = _loaded["forward"]
    return method.execute([torch.tensor([tokens]), torch.tensor([start])])


def _time(message: Time) -> Timed:
    seconds: list[float] = []
    for position in range(message.start, message.start + message.count):
        begin = time.perf_counter()
        _run([5], position)
        seconds.append(time.perf_counter() - begin)
    return Timed(tuple(seconds))


def _generate(message: Generate) -> Generated:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    runner = TextLLMRunner(message.path, message.tokenizer)
    pieces: list[str] = []
    config = GenerationConfig(echo=False, max_new_tokens=message.count, temperature=0.0, num_bos=message.bos)
    runner.generate(message.prompt, config, token_callback=pieces.append)
    return Generated(tuple(pieces))


if __name__ == "__main__":
    serve(handle, sys.argv)
