"""Tokens/s of a runtime on this host: warm-up, repeats, median with an interval, several depths."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from eval.files.memory import PeakMemory
from eval.measurement import Measurement
from eval.speed.repeats import AT_LEAST, Repeats
from targets.runtime import Runtime

Clock = Callable[[], float]


def host_speed(
    runtime: Runtime,
    tokens: Sequence[int],
    *,
    decode_steps: int = 32,
    repeats: int = AT_LEAST,
    depths: Sequence[int] = (),
    clock: Clock = time.perf_counter,
) -> list[Measurement]:
    """Prefill and decode tokens/s, time to the first token, peak memory, on this machine.

    A repeat prefills all tokens into an empty cache, then decodes `decode_steps` more behind them. One repeat
    before the first that counts warms up. Each figure's note tells its interval, and whether the machine was
    noisy (repeats that differ by more than 5 %).

    Args:
        runtime: with room for len(tokens) + decode_steps in its context.
        tokens: the prompt; its last token is decoded again and again (speed does not depend on which it is).
        depths: more numbers of tokens in the cache at which decode is measured; their figures are named
            `decode_tokens_per_s@DEPTH`. Those that leave no room in the context are left out.
        clock: seconds.
    """
    with PeakMemory() as memory:
        turns = [_turn(runtime, tokens, decode_steps, clock) for _ in range(repeats + 1)][1:]
        first, prefill, decode = (Repeats(tuple(values)) for values in zip(*turns, strict=True))
        name = runtime.name
        prompt = f"{name}, {len(tokens)} tokens"
        behind = f"{name}, {decode_steps} tokens behind {len(tokens)}"
        figures = [
            prefill.measurement("prefill_tokens_per_s", "tokens/s", "measured", "host", prompt),
            decode.measurement("decode_tokens_per_s", "tokens/s", "measured", "host", behind),
            first.measurement("first_token_s", "s", "measured", "host", prompt),
        ]
        figures += [
            _at_depth(runtime, tokens, depth, decode_steps, repeats, clock)
            for depth in depths
            if 0 < depth <= runtime.context - decode_steps
        ]
    peak = memory.measurement()
    figures.append(
        Measurement("speed_peak_memory_bytes", peak.value, "bytes", "measured", None, None, peak.note, "host")
    )
    return figures


def _turn(runtime: Runtime, tokens: Sequence[int], steps: int, clock: Clock) -> tuple[float, float, float]:
    """Seconds to the first token, prefill tokens/s, decode tokens/s, from an empty cache."""
    runtime.reset()
    prefill = _seconds(clock, lambda: runtime.prefill(tokens))
    decode = _seconds(clock, lambda: _decode(runtime, tokens[-1], steps))
    return prefill, len(tokens) / prefill, steps / decode


def _at_depth(
    runtime: Runtime, tokens: Sequence[int], depth: int, steps: int, repeats: int, clock: Clock
) -> Measurement:
    """Decode behind `depth` tokens: the prompt, repeated (what stands in the cache costs the same)."""
    prompt = (list(tokens) * (depth // len(tokens) + 1))[:depth]
    rates = []
    for _ in range(repeats + 1):
        runtime.reset()
        runtime.prefill(prompt)
        rates.append(steps / _seconds(clock, lambda: _decode(runtime, prompt[-1], steps)))
    name, text = f"decode_tokens_per_s@{depth}", f"{runtime.name}, {steps} tokens behind {depth}"
    return Repeats(tuple(rates[1:])).measurement(name, "tokens/s", "measured", "host", text)


def _decode(runtime: Runtime, token: int, steps: int) -> None:
    for _ in range(steps):
        runtime.decode(token)


def _seconds(clock: Clock, work: Callable[[], object]) -> float:
    started = clock()
    work()
    return clock() - started
