"""The interface of a standard runner: the program that users open an artifact with.

It is not ours: it reads tokenizer, template, model and end tokens from the artifact's own files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from bluelm.errors import InputError, UnavailableError
from export.artifacts.artifact import Artifact
from export.formats import StandardRunner, function
from targets.runners.environment import parts, quoted, site
from targets.tools import FoundTool, examine


@dataclass(frozen=True)
class Prompt:
    """A chat as the program puts it to the model.

    Attributes:
        text: what its template gives. tokens: of that text.
        counted: how many tokens it says that an answer to this chat began with; None where there is no room for one.
    """

    text: str
    tokens: tuple[int, ...]
    counted: int | None


@dataclass(frozen=True)
class Continued:
    """What it answered.

    Attributes:
        tokens: without the one that ended the answer. ended: an end token came.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool


class Runner(Protocol):
    """An artifact in its program.

    Attributes:
        name: of the program, with its version.
        context: tokens that it says the model is made for. vocab_size: tokens that it knows.
    """

    name: str
    context: int
    vocab_size: int

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as a prompt is read: what begins a text in front, marks in it count."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]], tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        """A chat in the artifact's template; behind a last answer it is to be continued.

        Args:
            tools: JSON schemas of functions that the model may call.

        Raises:
            InputError: the template refuses it, or there is none.
        """
        ...

    def distributions(self, tokens: Sequence[int], prefilled: int) -> NDArray[np.float32]:
        """Log-probabilities [n, vocab] behind the first `prefilled` tokens, read at once, and behind each further one,
        read by itself."""
        ...

    def scores(self, tokens: Sequence[int], prefilled: int) -> NDArray[np.float32]:
        """Log-probabilities [n] of the tokens behind the first `prefilled`, by a program of `StandardRunner.scores`.

        Raises:
            InputError: it takes text, and none is read as these tokens.
        """
        ...

    def room(self, tokens: int) -> int:
        """How many tokens an answer to a prompt of so many may have at most; none where it is below 1."""
        ...

    def answer(self, tokens: Sequence[int], most: int, *, begin: int | None = None, seed: int = 0,
               temperature: float = 0.0) -> Continued:  # fmt: skip
        """The likeliest continuation (or a draw), at most `most` tokens, until an end token.

        Args:
            begin: the token that it has to begin with.
        """
        ...

    def close(self) -> None:
        """End the program. A runner is a context manager that closes itself."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def version_of(runner: StandardRunner) -> str | None:
    """The installed version of what brings the program; None where that or what it needs is not installed."""
    found = _parts(runner)
    return None if any(part.state == "missing" for part in found) else found[0].found


def named(runner: StandardRunner) -> str:
    """The program, and what is installed of what brings it."""
    of = "" if runner.name == runner.package else f" of {runner.package}"
    return f"{runner.name}{of} {version_of(runner)}"


def fix_of(runner: StandardRunner) -> str:
    """How to get the program."""
    found = _parts(runner)
    fix = next((part.tool.fix for part in found if part.state == "missing"), found[0].tool.fix)
    return f"{fix}, or in an environment of its own: bluelm-export doctor --setup {quoted(runner.name)}"


def _parts(runner: StandardRunner) -> list[FoundTool]:
    """What brings the program, and then what that needs, as it is found where the program runs."""
    place = site(runner)
    return [examine(tool, place) for tool in parts(runner)]


def runner_of(artifact: Artifact, name: str | None = None) -> StandardRunner:
    """The artifact's standard runner; `name`: that it must have.

    Raises:
        InputError: it has none, or another one.
    """
    found = artifact.record.runner
    if not isinstance(found, StandardRunner):
        raise InputError(f"no standard runner opens {artifact.format} here: {found.reason}", fix="omit --with")
    if name is not None and name != found.name:
        raise InputError(f"{name} does not open {artifact.format} artifacts", fix=f"use --with {found.name}")
    return found


def open_runner(artifact: Artifact, name: str | None = None) -> Runner:
    """The artifact in its standard runner.

    Raises:
        InputError: it has none, or another one. UnavailableError: that is not installed; with how to get it.
        TargetError: it refuses the artifact.
    """
    found = runner_of(artifact, name)
    missing = [part.tool.name for part in _parts(found) if part.state == "missing"]
    if missing:
        raise UnavailableError(f"not installed: {', '.join(missing)}", fix=fix_of(found))
    opened: Callable[[Artifact, StandardRunner], Runner] = function(found.opener)
    return opened(artifact, found)
