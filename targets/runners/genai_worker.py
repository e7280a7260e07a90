"""The child process that holds onnxruntime-genai: `og.Model`, `og.Tokenizer` and `og.Generator`, as apps use them."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bluelm.errors import InputError
from bluelm.system.reading import read_json
from targets.host.child import serve
from targets.runners import messages

og: Any = importlib.import_module("onnxruntime_genai")  # has no annotations
CONFIG = "genai_config.json"
CERTAIN = 1e4  # added to a token's logit
_held: dict[str, Any] = {}


_told = partial(messages.refused, "onnxruntime-genai", Exception)


def _load(message: messages.Load) -> messages.Loaded:
    """`path` is the folder."""
    with _told("the folder"):
        if '"QNN"' in (Path(message.path) / CONFIG).read_text(encoding="utf-8"):
            qnn: Any = importlib.import_module("onnxruntime_qnn")
            og.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
        model = og.Model(message.path)
        _held.update(model=model, tokenizer=og.Tokenizer(model))
    told = read_json(Path(message.path) / CONFIG)["model"]
    window = int(told["decoder"].get("sliding_window", {}).get("window_size", 1))
    _held.update(context=int(told["context_length"]), window=window)
    return messages.Loaded(_held["context"], int(told["vocab_size"]), window)


def _tokens(text: str) -> list[int]:
    return [int(token) for token in _held["tokenizer"].encode(text)]


def _chat(message: messages.Chat) -> messages.Prompted:
    answers = message.messages[-1]["role"] != "assistant"
    try:
        given = json.dumps(list(message.messages), ensure_ascii=False)
        tools = json.dumps(list(message.tools), ensure_ascii=False) if message.tools else None
        text = _held["tokenizer"].apply_chat_template(given, tools=tools, add_generation_prompt=answers)
    except Exception as error:  # noqa: BLE001
        raise InputError(f"onnxruntime-genai refuses the chat: {error}") from None
    tokens = _tokens(text)
    return messages.Prompted(text, tokens, len(tokens))


def _generator(tokens: list[int], **options: Any) -> Any:
    with _told("the tokens"):
        parameters = og.GeneratorParams(_held["model"])
        parameters.set_search_options(**options)
        generator = og.Generator(_held["model"], parameters)
        generator.append_tokens(tokens)
        return generator


def _logits(generator: Any) -> NDArray[np.float32]:
    logits = np.asarray(generator.get_logits(), np.float32)
    return logits.reshape(-1, logits.shape[-1])[-1]


def _distribute(message: messages.Distribute) -> messages.Distributed:
    generator = _generator(message.tokens[: message.prefilled], do_sample=False)
    rows = [_logits(generator)]
    for token in message.tokens[message.prefilled :]:
        if _held["window"] == 1:
            generator.append_tokens([token])
        else:  # what is appended would be a prompt once more, filled up to a window
            _say(generator, token)
        rows.append(_logits(generator))
    logits = np.stack(rows).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return messages.Distributed((logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32))


def _say(generator: Any, token: int) -> None:
    """Let it generate this token."""
    _favour(generator, token)
    generator.generate_next_token()
    if generator.is_done():
        raise InputError(f"onnxruntime-genai ends the text behind token {token}")


def _favour(generator: Any, token: int) -> None:
    logits = np.asarray(generator.get_logits(), np.float32).copy()
    logits[..., token] += CERTAIN
    generator.set_logits(logits)


def _answer(message: messages.Answer) -> messages.Answered:
    """One token where it has to begin with one: whether that ended the answer is asked."""
    temperature = float(message.options.get("temperature", 0.0))
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    most = 1 if message.begin is not None else message.most
    seed = {"random_seed": int(message.options.get("seed", 0))} if temperature else {}
    prompt = -(-len(message.tokens) // _held["window"]) * _held["window"]
    length = min(prompt + most + 1, _held["context"])  # with room for one more, it is done at an end alone
    generator = _generator(message.tokens, max_length=length, **drawn, **seed)
    if message.begin is not None:
        _favour(generator, message.begin)
    said: list[int] = []
    while len(said) < most and not generator.is_done():
        generator.generate_next_token()
        said.append(int(generator.get_next_tokens()[0]))
    ended = generator.is_done() and prompt + len(said) < length
    return messages.Answered(_held["tokenizer"].decode(said[:-1] if ended else said), said, ended)


if __name__ == "__main__":
    serve(messages.handler(_load, _tokens, _chat, _distribute, _answer), sys.argv)
