"""onnxruntime-genai in a child process: the folder as apps open it.

The record of onnx-genai does not name it yet: the gate would have to know that it puts nothing in front of a text, cuts
runs of over `export.onnx.genai_tokenizer.LONGEST` characters, and cannot leave a last answer open.
"""

from __future__ import annotations

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


class Genai:
    """A folder in onnxruntime-genai. See `targets.runners.runner.Runner`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._scratch = tempfile.TemporaryDirectory(prefix="bluelm-genai-")
        self._child = Child("targets.runners.genai_worker", Path(self._scratch.name) / "log.txt")
        try:
            loaded: m.Loaded = self._child.call(m.Load(str(folder.resolve())), LOAD_S)
        except ExportError as error:
            self.close()
            raise TargetError(error.problem, where=folder, fix="export it again") from None
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
        options = {"temperature": temperature, "seed": seed}
        found: m.Answered = self._child.call(m.Answer(list(tokens), most, options, begin), ASK_S)
        return Continued(found.text, tuple(found.tokens[:-1] if found.ended else found.tokens), found.ended)

    def close(self) -> None:
        self._child.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_genai(artifact: Artifact, runner: StandardRunner) -> Genai:
    """The artifact's folder.

    Raises:
        TargetError: onnxruntime-genai refuses it, or dies of it; with its words.
    """
    return Genai(artifact.folder, f"{runner.name} {version_of(runner)}")
