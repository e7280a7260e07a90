"""The child process that holds Core AI's CPU runtime: it ends by SIGILL where that meets what it does not know."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
from coreai.runtime import NDArray

from bluelm.errors import InputError, TargetError
from export.coreai.dialect import authoring
from export.coreai.static import contract as c
from targets.apple.coreai_messages import Open, Opened, Step, Stepped
from targets.apple.coreai_program import STREAM, WEIGHTS, functions, prepared
from targets.host.child import serve


class Functions:
    """A program's functions, with weights that are unpacked once."""

    def __init__(self, path: str, norms: int) -> None:
        self._loop, self._stack = asyncio.new_event_loop(), AsyncExitStack()
        try:
            program = authoring.AIModelAsset.load(path).program
            self.names = functions(program)
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bluelm-coreai-"))
            asset = prepared(program, norms).save_asset(Path(folder) / "program.aimodel")
            model = self._loop.run_until_complete(self._stack.enter_async_context(asset.executable()))
            self._held: dict[str, Any] = {name: model.load_function(name) for name in self.names}
            self._weights: dict[str, Any] = self._loop.run_until_complete(model.load_function(WEIGHTS)())
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise TargetError(f"Core AI refuses the program: {error}", where=path) from None

    def inputs(self, name: str) -> list[str]:
        """Names of what a function takes, weights left out."""
        return [one for one in self._held[name].desc.input_names if one not in self._weights]

    def states(self, name: str) -> dict[str, list[int | None]]:
        """Shapes of a function's states by name; None: of any length."""
        told = self._held[name].desc
        return {one: _shape(told.state_descriptor(one)) for one in told.state_names}

    def call(self, name: str, inputs: Mapping[str, Any], states: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name; states are written."""
        held = self._held[name]
        taken = {one: self._weights[one] for one in held.desc.input_names if one in self._weights}
        try:
            made = self._loop.run_until_complete(held(inputs={**inputs, **taken}, state=dict(states)))
        except RuntimeError as error:
            raise TargetError(f"Core AI fails in {name}: {error}") from None
        return dict(made)


class Dynamic:
    """A program of one function for lengths of any kind, with its states."""

    def __init__(self, held: Functions, message: Open) -> None:
        if message.function not in held.names:
            problem = f"the program has no function {message.function!r}"
            raise InputError(problem, where=message.path, fix="export it again")
        self._held, self._function = held, message.function
        shapes = held.states(message.function)
        full = {name: [message.slots if size is None else size for size in shape] for name, shape in shapes.items()}
        self._states = {name: NDArray(np.zeros(shape, np.float16)) for name, shape in full.items()}

    def step(self, message: Step) -> Stepped:
        """Positions are those of all tokens, from the first on."""
        tokens, length = np.array([message.tokens], np.int32), message.held + len(message.tokens)
        places = np.arange(length, dtype=np.int32)[None]
        given = dict(zip(self._held.inputs(self._function), (NDArray(tokens), NDArray(places)), strict=True))
        made = self._held.call(self._function, given, self._states)
        rows = {name: value.numpy()[0].astype(np.float32) for name, value in made.items()}
        count = len(rows) - 1
        stream = np.stack([rows[f"{STREAM}.{place}"] for place in range(count)]) if message.shown else None
        return Stepped(rows["logits"], stream)


class Static:
    """A program of functions for fixed lengths, called as Apple's engine does: `export/coreai/static/contract.py`."""

    def __init__(self, held: Functions, message: Open) -> None:
        self._held, self._context, self._tokens = held, message.slots, list[int]()
        fits = [name for name in held.names if name.startswith("extend") and self._slots(name) == message.slots]
        if not fits:
            problem = f"no function has a context of {message.slots} tokens"
            raise TargetError(f"Apple's engine refuses the program: {problem}", where=message.path)
        self._sizes = [int(name.split("_")[2]) for name in fits]
        shapes = {name: [size or 0 for size in shape] for name, shape in held.states(fits[0]).items()}
        self._states = {name: NDArray(np.zeros(shape, np.float16)) for name, shape in shapes.items()}
        self._table = held.call(c.LOAD, {}, {})[c.TABLE]

    def _slots(self, name: str) -> int:
        """The engine takes the longest axis of the cache for the context."""
        return max(size or 0 for size in self._held.states(name)[c.KEYS])

    def step(self, message: Step) -> Stepped:
        """As many calls as it takes; tokens before the first new one are computed again."""
        if message.held > len(self._tokens):
            raise InputError(f"of {message.held} tokens before these {len(self._tokens)} are known")
        self._tokens[message.held :] = message.tokens
        at, end = message.held, len(self._tokens)
        rows: list[np.ndarray] = []
        streams: list[np.ndarray] = []
        while at < end:
            name, size = c.chosen(self._context, self._sizes, end - at, message.last)
            first, behind = at // size * size, min(at // size * size + size, end)
            made = self._call(name, size, first, self._tokens[first:behind])
            new = slice(at - first, behind - first)
            if name.startswith("extend"):
                rows.append(made.pop(c.LOGITS).numpy().reshape(size, -1)[new].astype(np.float32))
            if message.shown:
                shown = [made[f"{STREAM}.{place}"].numpy()[0, :, 0].T[new] for place in range(len(made))]
                streams.append(np.stack(shown).astype(np.float32))
            at = behind
        return Stepped(np.concatenate(rows), np.concatenate(streams, axis=1) if message.shown else None)

    def _call(self, name: str, size: int, first: int, tokens: list[int]) -> dict[str, Any]:
        """One step from position `first` on; what a chunk lacks are tokens that see nothing."""
        ids = np.zeros((1, size), np.int32)
        ids[0, : len(tokens)] = tokens
        gathered = self._held.call(c.gather(size), {c.TOKENS: NDArray(ids), c.TABLE: self._table}, {})[c.GATHERED]
        places = np.arange(first, first + size)
        seen = np.arange(self._context)[:, None] <= places
        seen[:, len(tokens) :] = False
        mask = np.where(seen, 0, c.HIDDEN_SCORE).astype(np.float16)[None, :, None]
        given = {
            c.STREAM: gathered,
            c.POSITIONS: NDArray(places.astype(np.uint16)[None]),
            c.STEP: NDArray(np.array([first], np.int32)),
            c.MASK: NDArray(mask),
        }
        return self._held.call(name, given, self._states)


def opened(message: Open) -> Dynamic | Static:
    """By what the program has, as Apple's factory of engines decides."""
    held = Functions(message.path, message.norms)
    return (Static if c.LOAD in held.names else Dynamic)(held, message)


def _shape(descriptor: Any) -> list[int | None]:
    return [None if size is None or size < 0 else int(size) for size in descriptor.shape]


_held: list[Dynamic | Static] = []


def handle(message: Open | Step) -> Opened | Stepped:
    """Answer a message."""
    match message:
        case Open():
            _held[:] = [opened(message)]
            return Opened()
        case Step():
            if not _held:
                raise InputError("nothing is open")
            return _held[0].step(message)


if __name__ == "__main__":
    serve(handle, sys.argv)
