"""The child process that opens Core AI's folder by what that says of itself, as Apple's `CoreAILanguageModel` does.

It goes by metadata.json and the tokenizer's folder alone, and ends an answer as `export/coreai/stops.py` says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from bluelm.errors import InputError
from bluelm.system.reading import read_json
from export.coreai import METADATA, TOKENIZER
from export.coreai.stops import stops
from targets.apple.coreai_messages import Open, Step
from targets.apple.coreai_worker import opened
from targets.host.child import serve
from targets.runners import messages as m
from targets.runners.hugging_face import prompted

PROGRAM = "transformers"
_held: dict[str, Any] = {}


def _load(message: m.Load) -> m.Loaded:
    """`path` is the folder."""
    folder = Path(message.path)
    told = read_json(folder / METADATA)
    language = told["language"]
    context, vocabulary = int(language["max_context_length"]), int(language["vocab_size"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER)
    except Exception as error:  # noqa: BLE001  (of two libraries, each with its own kinds)
        raise InputError(f"{PROGRAM} refuses the tokenizer: {error}", where=folder / TOKENIZER) from None
    program = Open(str(folder / told["assets"]["main"]), language["function_map"]["main"][0], context, norms=1)
    _held.update(tokenizer=tokenizer, program=opened(program), stops=stops(folder / TOKENIZER))
    return m.Loaded(context, vocabulary)


def _tokens(text: str) -> list[int]:
    return [int(token) for token in _held["tokenizer"].encode(text)]


def _chat(message: m.Chat) -> m.Prompted:
    return prompted(_held["tokenizer"], message, PROGRAM)


def _behind(tokens: list[int], held: int) -> np.ndarray:
    """Log-probabilities float32 [vocab] behind the last of some more tokens."""
    logits = _held["program"].step(Step(tokens, held, last=True)).logits[-1].astype(np.float64)
    logits -= logits.max()
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


def _distribute(message: m.Distribute) -> m.Distributed:
    rows = [_behind(message.tokens[: message.prefilled], 0)]
    rows += [_behind([message.tokens[at]], at) for at in range(message.prefilled, len(message.tokens))]
    return m.Distributed(np.stack(rows))


def _answer(message: m.Answer) -> m.Answered:
    """The likeliest token, or a drawn one where there is a temperature."""
    random = np.random.default_rng(int(message.options.get("seed", 0)))
    heat = float(message.options.get("temperature", 0.0))
    said: list[int] = []
    rows = _behind(message.tokens, 0)
    while True:
        shares = np.exp(rows.astype(np.float64) / heat) if heat else np.zeros(0)
        chosen = int(random.choice(len(rows), p=shares / shares.sum())) if heat else int(rows.argmax())
        said.append(message.begin if message.begin is not None and not said else chosen)
        ended = said[-1] in _held["stops"]
        if ended or len(said) == message.most:
            text = _held["tokenizer"].decode(said[: len(said) - ended])
            return m.Answered(text, said, ended)
        rows = _behind([said[-1]], len(message.tokens) + len(said) - 1)


if __name__ == "__main__":
    serve(m.handler(_load, _tokens, _chat, _distribute, _answer), sys.argv)
