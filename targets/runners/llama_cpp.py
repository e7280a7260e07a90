"""llama.cpp, of the package xllamacpp: its server in a child process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bluelm.errors import ExportError, TargetError
from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from targets.host.child import Child
from targets.runners import messages as m
from targets.runners.runner import Continued, Prompt, version_of

LOAD_S, ASK_S = 600.0, 1800.0
THREADS = 2


class LlamaCpp:
    """A GGUF file in llama.cpp. See `targets.runners.runner.Runner`."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._scratch = tempfile.TemporaryDirectory(prefix="bluelm-llama-cpp-")
        self._child = Child("targets.runners.llama_cpp_worker", Path(self._scratch.name) / "log.txt")
        try:
            loaded: m.Loaded = self._child.call(m.Load(str(path.resolve()), _threads()), LOAD_S)
        except ExportError as error:
            told = next((line.partition(" E ")[2] for line in self._child.tail(40).splitlines() if " E " in line), "")
            self.close()
            problem = f"llama.cpp refuses the file: {told.strip()}" if told else error.problem
            raise TargetError(problem, where=path, fix="export it again") from None
        self.context, self.vocab_size = loaded.context, loaded.vocab_size

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        found: m.Tokenized = self._child.call(m.Tokenize(tuple(texts)), ASK_S)
        return found.tokens

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        found: m.Prompted = self._child.call(m.Chat(tuple(map(dict, messages))), ASK_S)
        return Prompt(found.text, tuple(found.tokens), found.counted)

    def distributions(self, tokens: Sequence[int], prefilled: int) -> NDArray[np.float32]:
        found: m.Distributed = self._child.call(m.Distribute(list(tokens), prefilled), ASK_S)
        return found.log_probabilities

    def answer(
        self, tokens: Sequence[int], most: int, *, begin: int | None = None, seed: int = 0, temperature: float = 0.0
    ) -> Continued:
        plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} if temperature else {}  # its own defaults leave tokens out
        options = {"temperature": temperature, "seed": seed, **plain}
        found: m.Answered = self._child.call(m.Answer(list(tokens), most, options, begin), ASK_S)
        return Continued(found.text, tuple(found.tokens[:-1] if found.ended else found.tokens), found.ended)

    def close(self) -> None:
        self._child.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _threads() -> int:
    """As many as the other runtimes here are given; its threads wait for one another at full speed."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) > 0 else THREADS


def open_llama_cpp(artifact: Artifact, runner: StandardRunner) -> LlamaCpp:
    """The artifact's file.

    Raises:
        TargetError: llama.cpp refuses it, or dies of it; with its words.
    """
    return LlamaCpp(artifact.path("model"), f"{runner.name} of {runner.package} {version_of(runner)}")
