"""The interface of a loaded model: prefill, decode and reset, which return logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from bluelm.errors import InputError, UnavailableError
from export.artifacts.artifact import Artifact, Format
from export.formats import Place, Run, function, record

__all__ = ["Place", "Runtime", "RuntimeBase", "natural", "only_on_device", "open_runtime", "run_of"]


class Runtime(Protocol):
    """One model, loaded, with one KV cache.

    Attributes:
        name: what runs, for reports.
        vocab_size: columns of the logits.
        context: tokens that the cache holds.
    """

    name: str
    vocab_size: int
    context: int

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def rewind(self, held: int) -> None:
        """Forget all but the first `held` tokens, of those that the cache holds."""
        ...

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Take tokens behind those that the cache holds; float32 [n, vocab], a row for each.

        Raises:
            InputError: more tokens than the context holds, or a token that the vocabulary lacks.
        """
        ...

    def decode(self, token: int) -> np.ndarray:
        """Take one token; float32 [vocab]."""
        ...

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Reset, then prefill."""
        ...

    def close(self) -> None:
        """Free what is held outside this process. A runtime is a context manager that closes itself."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class RuntimeBase:
    """The part of `Runtime` that follows from prefill, reset and rewind."""

    name: str
    vocab_size: int
    context: int

    def reset(self) -> None:
        raise NotImplementedError

    def rewind(self, held: int) -> None:
        raise NotImplementedError

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    def decode(self, token: int) -> np.ndarray:
        return self.prefill([token])[0]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self.reset()
        return self.prefill(tokens)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_tokens(self, tokens: Sequence[int], held: int) -> None:
        """InputError unless the vocabulary has the tokens and the cache, holding `held`, has room."""
        if len(tokens) == 0:
            raise InputError("no tokens to prefill", where=self.name)
        if held + len(tokens) > self.context:
            raise InputError(
                f"{held} + {len(tokens)} tokens do not fit a context of {self.context}",
                where=self.name,
                fix="shorten the text or export with a larger context",
            )
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise InputError(f"token {token} is outside the vocabulary of {self.vocab_size}", where=self.name)


def open_runtime(folder: Path, on: Place = "cpu") -> Runtime:
    """Load an artifact.

    Args:
        on: one of the places where its format runs (`Record.runs`): `arm64` is arm64 code under qemu, `htp`
            Qualcomm's simulator of its NPU in a child process, `interpreter` ours of Core ML programs; `gpu` and `ane`
            are a Mac's.

    Raises:
        InputError: no artifact, or one that cannot run there.
        UnavailableError: the runtime is not installed, or nothing here can run such an artifact.
        TargetError: the runtime refuses the artifact.
    """
    artifact = Artifact.open(folder)
    run = run_of(artifact, on)
    opened: Callable[..., Runtime] = function(run.opener)
    return opened(artifact, *run.options)


def run_of(artifact: Artifact, on: Place) -> Run:
    """How an artifact runs there.

    Raises:
        InputError: it does not. UnavailableError: nothing here can run it.
    """
    runs = artifact.record.runs
    if not runs:
        raise only_on_device(artifact)
    if on not in runs:
        raise InputError(
            f"a {artifact.format} artifact does not run on {on!r}",
            where=artifact.folder,
            fix=f"it runs on {' or '.join(map(repr, runs))}",
        )
    return runs[on]


def natural(kind: Format) -> Place:
    """Where `open_runtime` runs a format's artifacts if nothing else is asked for."""
    places: list[Place] = [*record(kind).runs, "device"]
    return places[0]


def only_on_device(artifact: Artifact) -> UnavailableError:
    """The error for an artifact that nothing here can run."""
    return UnavailableError(
        f"only a phone can run this {artifact.format} artifact: nothing was measured, so it has not passed",
        where=artifact.folder,
        fix=f"run it on a phone with {artifact.soc or 'its chip'}, or choose a --runtime that is judged here",
    )
