"""A Core ML artifact as a `Runtime`: its programs one after another, run by the interpreter or a Mac."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bluelm.errors import InputError
from export.coreml.program import (
    DECODE,
    EMBEDDED,
    HIDDEN,
    HIDDEN_OUT,
    LOGITS,
    POSITION,
    PREFILL,
    TOKENS,
    block_output,
)
from targets.apple.interpreter.interpreter import Interpreter
from targets.runtime import RuntimeBase


class Engine(Protocol):
    """Runs the functions of one package; holds one set of states."""

    def reset(self) -> None:
        """Forget the states."""
        ...

    def inputs(self, function: str) -> Mapping[str, tuple[int | None, ...]]:
        """Shapes of a function's inputs by name, states left out."""
        ...

    def run(self, function: str, inputs: Mapping[str, np.ndarray], watch: Collection[str]) -> Mapping[str, np.ndarray]:
        """Outputs, and of the values in `watch` those that it has; states carry over to the next call."""
        ...


class Interpreted:
    """The reference interpreter."""

    def __init__(self, package: Path, *, rounding: bool = True) -> None:
        self._interpreter = Interpreter(package, rounding=rounding)
        self.reset()

    def reset(self) -> None:
        self._state = self._interpreter.make_state(PREFILL)  # both functions name the same states

    def inputs(self, function: str) -> Mapping[str, tuple[int | None, ...]]:
        declared = self._interpreter.function(function).inputs
        return {name: kind.shape or () for name, kind in declared.items()}

    def run(self, function: str, inputs: Mapping[str, np.ndarray], watch: Collection[str]) -> Mapping[str, np.ndarray]:
        made = self._interpreter.function(function).made
        return self._interpreter.run(inputs, self._state, function, [name for name in watch if name in made])


class CoreMLRuntime(RuntimeBase):
    """A `Runtime` over one engine a program, in order: hidden states go from one into the next.

    Args:
        name: how reports call it.
        engines: one for each program of the artifact.
        vocab_size, context, layers: of the model.
    """

    def __init__(self, name: str, engines: Sequence[Engine], vocab_size: int, context: int, layers: int) -> None:
        self.name, self.vocab_size, self.context, self._layers = name, vocab_size, context, layers
        self._engines = engines
        first = engines[0].inputs(PREFILL)
        if TOKENS not in first or first[TOKENS][-1] is None:
            raise InputError(f"the first program takes {sorted(first)}, not {TOKENS!r}: not a package of ours")
        self.chunk = int(first[TOKENS][-1] or 1)
        self._position = 0

    def reset(self) -> None:
        """Forget every token."""
        self._position = 0
        for engine in self._engines:
            engine.reset()

    def rewind(self, held: int) -> None:
        """Forget all but the first tokens; what the states hold behind them is hidden, then overwritten."""
        self._position = held

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits float32 [n, vocab] of tokens that continue what the cache holds."""
        return self._continue(tokens, ())[LOGITS]

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """The stream before the first block and behind each, float32 [layers + 1, n, hidden]; begins anew."""
        self.reset()
        names = [EMBEDDED, *(block_output(i) for i in range(self._layers))]
        found = self._continue(tokens, names)
        return np.stack([found[name] for name in names])

    def _continue(self, tokens: Sequence[int], watch: Sequence[str]) -> dict[str, np.ndarray]:
        """Run tokens in chunks, the last one padded, or singly where a chunk would leave the cache."""
        self.check_tokens(tokens, self._position)
        collected: dict[str, list[np.ndarray]] = {name: [] for name in (LOGITS, *watch)}
        left = [int(t) for t in tokens]
        while left:
            whole = len(left) > 1 and self._position + self.chunk <= self.context
            size = self.chunk if whole else 1
            part, left = left[:size], left[size:]
            found = self._step(PREFILL if whole else DECODE, part + [0] * (size - len(part)), watch)
            for name, rows in collected.items():
                rows.append(np.asarray(found[name], np.float32)[0, : len(part)])
            self._position += len(part)
        return {name: np.concatenate(rows) for name, rows in collected.items()}

    def _step(self, function: str, tokens: list[int], watch: Sequence[str]) -> dict[str, np.ndarray]:
        """One call of every program. Keys of pads land behind the text and are overwritten before seen."""
        position = np.array([self._position], np.int32)
        inputs: dict[str, Any] = {TOKENS: np.array([tokens], np.int32)}
        found: dict[str, np.ndarray] = {}
        for engine in self._engines:
            outputs = engine.run(function, {**inputs, POSITION: position}, watch)
            found |= outputs
            if HIDDEN_OUT in outputs:
                inputs = {HIDDEN: outputs[HIDDEN_OUT]}
        if absent := [name for name in watch if name not in found]:
            raise InputError(
                f"{self.name} does not show {absent[0]!r}",
                fix="export a debug build: it shows every block's output",
            )
        return found
