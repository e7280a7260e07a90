"""The child process that holds mlx-lm: `load`, its tokenizer, and `stream_generate`, as its command line uses them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from bluelm.errors import InputError
from bluelm.system.reading import read_json
from targets.apple.mlx_model import choose, prepared
from targets.host.child import serve
from targets.runners import messages as m
from targets.runners.hugging_face import prompted

CERTAIN = 1e4  # added to a token's logit
UNIT = "cpu"
_held: dict[str, Any] = {}


def _load(message: m.Load) -> m.Loaded:
    """`path` is the folder."""
    choose(UNIT)
    try:
        model, tokenizer = load(message.path)[:2]
    except Exception as error:  # noqa: BLE001  (of three libraries, each with its own kinds)
        raise InputError(f"mlx-lm refuses the folder: {error}", where=message.path) from None
    _held.update(model=prepared(model, UNIT), tokenizer=tokenizer)
    told = read_json(Path(message.path) / "config.json")
    return m.Loaded(int(told["max_position_embeddings"]), int(told["vocab_size"]))


def _tokens(text: str) -> list[int]:
    return [int(token) for token in _held["tokenizer"].encode(text)]


def _chat(message: m.Chat) -> m.Prompted:
    return prompted(_held["tokenizer"], message, "mlx-lm")


def _distribute(message: m.Distribute) -> m.Distributed:
    cache = make_prompt_cache(_held["model"])
    steps = [message.tokens[: message.prefilled], *([token] for token in message.tokens[message.prefilled :])]
    rows: list[np.ndarray] = []
    for step in steps:
        logits = _held["model"](mx.array([step]), cache=cache)[0, -1].astype(mx.float32)
        rows.append(np.array(logits - mx.logsumexp(logits)))
    return m.Distributed(np.stack(rows))


def _answer(message: m.Answer) -> m.Answered:
    """One token where it has to begin with one: whether that ended the answer is asked."""
    mx.random.seed(int(message.options.get("seed", 0)))
    processors = [] if message.begin is None else [_beginning(message.begin)]
    sampler = make_sampler(temp=float(message.options.get("temperature", 0.0)))
    most = 1 if message.begin is not None else message.most
    said: list[int] = []
    texts: list[str] = []
    ended = False
    steps = stream_generate(
        _held["model"],
        _held["tokenizer"],
        message.tokens,
        max_tokens=most,
        sampler=sampler,
        logits_processors=processors,
    )
    for step in steps:
        said.append(int(step.token))
        texts.append(step.text)
        ended = step.finish_reason == "stop"
    return m.Answered("".join(texts), said, ended)


def _beginning(token: int) -> Any:
    def biased(tokens: mx.array, logits: mx.array) -> mx.array:
        logits[..., token] += CERTAIN
        return logits

    return biased


if __name__ == "__main__":
    serve(m.handler(_load, _tokens, _chat, _distribute, _answer), sys.argv)
