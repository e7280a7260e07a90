"""The child process that holds Core AI's CPU runtime: it ends by SIGILL where that meets what it does not know."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
from coreai.runtime import NDArray

from bluelm.errors import InputError, TargetError
from export.coreai.dialect import authoring
from targets.apple.coreai_messages import Open, Opened, Step, Stepped
from targets.apple.coreai_program import STREAM, WEIGHTS, prepared
from targets.host.child import serve


class Held:
    """One program with its states."""

    def __init__(self, message: Open) -> None:
        self._loop, self._stack = asyncio.new_event_loop(), AsyncExitStack()
        try:
            program = prepared(authoring.AIModelAsset.load(message.path).program, message.function, message.norms)
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bluelm-coreai-"))
            asset = program.save_asset(Path(folder) / "program.aimodel")
            model = self._loop.run_until_complete(self._stack.enter_async_context(asset.executable()))
            self._function: Any = model.load_function(message.function)
            unpack = model.load_function(WEIGHTS)
            self._weights: dict[str, Any] = self._loop.run_until_complete(unpack())
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise TargetError(f"Core AI refuses the program: {error}", where=message.path) from None
        told = self._function.desc
        free = {name: _shape(told.state_descriptor(name)) for name in told.state_names}
        self._inputs = [name for name in told.input_names if name not in self._weights]
        shapes = {name: [message.slots if size is None else size for size in shape] for name, shape in free.items()}
        self._states = {name: NDArray(np.zeros(shape, np.float16)) for name, shape in shapes.items()}

    def step(self, message: Step) -> Stepped:
        """Positions are those of all tokens, from the first on."""
        tokens, length = np.array([message.tokens], np.int32), message.held + len(message.tokens)
        places = np.arange(length, dtype=np.int32)[None]
        given = dict(zip(self._inputs, (NDArray(tokens), NDArray(places)), strict=True)) | self._weights
        try:
            made = self._loop.run_until_complete(self._function(inputs=given, state=self._states))
        except RuntimeError as error:
            raise TargetError(f"Core AI fails at {len(message.tokens)} tokens: {error}") from None
        rows = {name: value.numpy()[0].astype(np.float32) for name, value in made.items()}
        count = len(rows) - 1
        stream = np.stack([rows[f"{STREAM}.{place}"] for place in range(count)]) if message.shown else None
        return Stepped(rows["logits"], stream)


def _shape(descriptor: Any) -> list[int | None]:
    return [None if size is None or size < 0 else int(size) for size in descriptor.shape]


_held: list[Held] = []


def handle(message: Open | Step) -> Opened | Stepped:
    """Answer a message."""
    match message:
        case Open():
            _held[:] = [Held(message)]
            return Opened()
        case Step():
            if not _held:
                raise InputError("nothing is open")
            return _held[0].step(message)


if __name__ == "__main__":
    serve(handle, sys.argv)
