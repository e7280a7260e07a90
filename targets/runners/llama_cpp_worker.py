"""The child process that holds llama.cpp's server; it is asked over HTTP on this machine alone, as any client asks."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import xllamacpp

from bluelm.errors import InputError
from targets.host.child import serve
from targets.runners import messages

LEAST = -103.28  # log of the smallest float32: what the program calls impossible
GREEDY: dict[str, Any] = {"temperature": 0.0, "cache_prompt": False}
CERTAIN = 1e4  # added to a token's logit
_held: dict[str, Any] = {}


def _load(message: messages.Load) -> messages.Loaded:
    """Context, template and end tokens are the file's: nothing is set but the threads and who may ask."""
    llama: Any = xllamacpp
    params = llama.CommonParams()
    params.model.path = message.path
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = message.threads
    params.n_ctx, params.n_parallel, params.fit_params, params.warmup = 0, 1, False, False
    key = secrets.token_hex()
    params.api_keys = [key]
    try:
        server = llama.Server(params)
    except RuntimeError as error:
        raise InputError(f"llama.cpp refuses the file: {error}", where=message.path) from None
    _held.update(server=server, key=key, place=urlsplit(server.listening_address).netloc)
    told = _ask("GET", "/v1/models")["data"][0]["meta"]
    _held.update(vocab=int(told["n_vocab"]), context=int(told["n_ctx_train"]))
    return messages.Loaded(_held["context"], _held["vocab"])


def _tokens(text: str) -> list[int]:
    return _ask("POST", "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


def _chat(message: messages.Chat) -> messages.Prompted:
    chat: dict[str, Any] = {"messages": list(message.messages)}
    if message.tools:
        chat["tools"] = list(message.tools)
    text = _ask("POST", "/apply-template", chat)["prompt"]
    tokens = _tokens(text)
    if len(tokens) >= _held["context"]:
        return messages.Prompted(text, tokens, None)
    answered = _ask("POST", "/v1/chat/completions", {**chat, **GREEDY, "max_tokens": 1})
    return messages.Prompted(text, tokens, int(answered["usage"]["prompt_tokens"]))


def _distribute(message: messages.Distribute) -> messages.Distributed:
    """Each further token follows what the program holds of the prompt before, so it is decoded by itself.

    A plain letter is what it has to answer with: behind an end token, or a part of a character, it tells no
    probabilities. They are those before that is asked for.
    """
    rows, letter = [], [[_tokens("a")[-1], CERTAIN]]
    for length in range(message.prefilled, len(message.tokens) + 1):
        again = {"cache_prompt": length > message.prefilled}
        asked = {
            "prompt": message.tokens[:length],
            "n_predict": 1,
            "n_probs": _held["vocab"],
            "logit_bias": letter,
            **GREEDY,
            **again,
        }
        told = _ask("POST", "/completion", asked)["completion_probabilities"][0]["top_logprobs"]
        row = np.full(_held["vocab"], LEAST, np.float32)
        row[[one["id"] for one in told]] = [LEAST if one["logprob"] is None else one["logprob"] for one in told]
        rows.append(np.maximum(row, LEAST))
    return messages.Distributed(np.stack(rows))


def _answer(message: messages.Answer) -> messages.Answered:
    asked: dict[str, Any] = {"prompt": message.tokens, "n_predict": message.most, **GREEDY, **message.options}
    bias = {} if message.begin is None else {"n_predict": 1, "logit_bias": [[message.begin, CERTAIN]]}
    told = _ask("POST", "/completion", {**asked, **bias, "return_tokens": True})
    return messages.Answered(told["content"], [int(token) for token in told["tokens"]], told["stop_type"] == "eos")


def _ask(method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The answer of the program's server.

    Raises:
        InputError: it refuses; with its words.
    """
    connection = HTTPConnection(_held["place"])
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {_held['key']}"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        told = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        error = told.get("error", told) if isinstance(told, dict) else told
        raise InputError(f"llama.cpp refuses {path}: {error.get('message', error)}")
    return told


if __name__ == "__main__":
    serve(messages.handler(_load, _tokens, _chat, _distribute, _answer), sys.argv)
