"""Generation with any runtime: one token after another, until an end token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from numpy.typing import NDArray

from bluelm.text.tokenizer import Tokenizer
from export.artifacts.artifact import Artifact
from targets.runtime import Runtime


def ends(tokenizer: Tokenizer, artifact: Artifact) -> set[int]:
    """Tokens that end an answer: the model's, as its generation_config.json and config.json name them; else the
    tokenizer's."""
    return set(artifact.model.eos_token_ids or ([] if tokenizer.eos is None else [tokenizer.eos]))


def generate(
    runtime: Runtime, prompt: Sequence[int], max_tokens: int, choose: Callable[[NDArray], int]
) -> Iterator[int]:
    """Tokens that the runtime answers with: at most `max_tokens`, or what its context holds."""
    runtime.reset()
    logits = runtime.prefill(prompt)[-1]  # [vocab]
    last = min(len(prompt) + max_tokens, runtime.context) - 1
    for position in range(len(prompt), last + 1):
        token = choose(logits)
        yield token
        if position < last:
            logits = runtime.decode(token)


def until(tokens: Iterator[int], ends: Collection[int]) -> Iterator[int]:
    """The tokens before the first that ends an answer."""
    for token in tokens:
        if token in ends:
            return
        yield token
