"""Messages between a standard runner's two processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bluelm.errors import TargetError


@dataclass(frozen=True)
class Load:
    """Open the file at `path` as its users do."""

    path: str
    threads: int = 2


@dataclass(frozen=True)
class Loaded:
    """What the program says of it: tokens that the model is made for, tokens that it knows; a prompt is filled up to
    whole windows."""

    context: int
    vocab_size: int
    window: int = 1


@dataclass(frozen=True)
class Tokenize:
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Tokenized:
    tokens: list[list[int]]


@dataclass(frozen=True)
class Chat:
    """`messages`: role and content of each. `tools`: JSON schemas of functions, as templates take them."""

    messages: tuple[dict[str, str], ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Prompted:
    """The template's text, its tokens, and how many tokens an answer to this chat began with: None where the context
    holds no answer."""

    text: str
    tokens: list[int]
    counted: int | None


@dataclass(frozen=True)
class Distribute:
    """All probabilities behind the first `prefilled` tokens and behind each further one."""

    tokens: list[int]
    prefilled: int


@dataclass(frozen=True)
class Distributed:
    """float32 [n, vocab]."""

    log_probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """Each token behind the first `prefilled`."""

    tokens: list[int]
    prefilled: int


@dataclass(frozen=True)
class Scored:
    """float32 [n]."""

    log_probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """Continue `tokens`; `options`: of sampling, by the program's names."""

    tokens: list[int]
    most: int
    options: dict[str, Any]
    begin: int | None = None


@dataclass(frozen=True)
class Answered:
    text: str
    tokens: list[int]
    ended: bool


@contextmanager
def refused(program: str, kind: type[Exception], what: str) -> Iterator[None]:
    """The program raises plain exceptions of this kind.

    Raises:
        TargetError: it refuses; with its words.
    """
    try:
        yield
    except kind as error:
        raise TargetError(f"{program} refuses {what}: {error}") from None


Message = Load | Tokenize | Chat | Distribute | Score | Answer


def handler(
    load: Callable[[Load], Loaded],
    tokens: Callable[[str], list[int]],
    chat: Callable[[Chat], Prompted],
    distribute: Callable[[Distribute], Distributed],
    answer: Callable[[Answer], Answered],
    score: Callable[[Score], Scored] | None = None,
) -> Callable[[Message], object]:
    """What a program's child does with each message."""

    def handle(message: Message) -> object:
        match message:
            case Load():
                return load(message)
            case Tokenize():
                return Tokenized([tokens(text) for text in message.texts])
            case Chat():
                return chat(message)
            case Distribute():
                return distribute(message)
            case Score():
                assert score is not None
                return score(message)
            case Answer():
                return answer(message)

    return handle
