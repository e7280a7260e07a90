"""A standard runner in a child process of its own: what every program's has in common."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bluelm.errors import ExportError, TargetError
from export.formats import StandardRunner
from targets.host.child import Child
from targets.runners import messages as m
from targets.runners.environment import python
from targets.runners.runner import Continued, Prompt, named

LOAD_S, ASK_S = 600.0, 1800.0
TAIL = 40  # lines of the log in which a program tells why it refuses a file


class ChildRunner:
    """See `targets.runners.runner.Runner`.

    Args:
        module: of the child, which answers `targets.runners.messages`.
        load: opens the artifact.
        runner: whose program it is; it runs in the environment of its own where it has one.
        drawn: its options where it draws an answer, for those of its defaults that leave tokens out.
        words: why it refused a file, from the end of its log; "" where that does not tell.
        core: the one that all of its threads share. Default: any.

    Raises:
        TargetError: it refuses the artifact, or dies of it; with its words.
    """

    def __init__(
        self,
        module: str,
        load: m.Load,
        runner: StandardRunner,
        *,
        drawn: Mapping[str, Any] | None = None,
        words: Callable[[str], str] = lambda tail: "",
        core: int | None = None,
    ) -> None:
        self.name, self._drawn = named(runner), dict(drawn or {})
        self._scratch = tempfile.TemporaryDirectory(prefix="bluelm-runner-")
        log = Path(self._scratch.name) / "log.txt"
        self._child = Child(module, log, python=python(runner), core=core)
        try:
            loaded: m.Loaded = self._child.call(load, LOAD_S)
        except ExportError as error:
            told = words(self._child.tail(TAIL))
            self.close()
            raise TargetError(told or error.problem, where=load.path, fix="export it again") from None
        self.context, self.vocab_size, self._window = loaded.context, loaded.vocab_size, loaded.window

    def room(self, tokens: int) -> int:
        return self.context - -(-tokens // self._window) * self._window

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        found: m.Tokenized = self._child.call(m.Tokenize(tuple(texts)), ASK_S)
        return found.tokens

    def chat(self, messages: Sequence[Mapping[str, str]], tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        found: m.Prompted = self._child.call(m.Chat(tuple(map(dict, messages)), tuple(map(dict, tools))), ASK_S)
        return Prompt(found.text, tuple(found.tokens), found.counted)

    def distributions(self, tokens: Sequence[int], prefilled: int) -> NDArray[np.float32]:
        found: m.Distributed = self._child.call(m.Distribute(list(tokens), prefilled), ASK_S)
        return found.log_probabilities

    def scores(self, tokens: Sequence[int], prefilled: int) -> NDArray[np.float32]:
        found: m.Scored = self._child.call(m.Score(list(tokens), prefilled), ASK_S)
        return found.log_probabilities

    def answer(
        self, tokens: Sequence[int], most: int, *, begin: int | None = None, seed: int = 0, temperature: float = 0.0
    ) -> Continued:
        options = {"temperature": temperature, "seed": seed, **(self._drawn if temperature else {})}
        found: m.Answered = self._child.call(m.Answer(list(tokens), most, options, begin), ASK_S)
        return Continued(found.text, tuple(found.tokens[:-1] if found.ended else found.tokens), found.ended)

    def close(self) -> None:
        self._child.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
