"""The child process that holds LiteRT-LM (`Engine`, `Conversation`, `Session`, as its users call them), and LiteRT's
interpreter on the same file.

A session takes text and says text: the tokens of an answer are followed in the interpreter, which must find each of
them as likely as any. All weights are held once: either LiteRT-LM has them or the interpreter.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bluelm.errors import InputError, TargetError
from export.artifacts.artifact import Artifact
from export.litert_lm.reader import LitertLmFile
from targets.arm64.litert_lm import LitertLmRuntime, open_litert_lm
from targets.host.child import serve
from targets.runners import messages as m
from targets.runners.litert_lm.constant import write_constant
from targets.runners.spelling import spelled

lm: Any = importlib.import_module("litert_lm")
PROGRAM = "LiteRT-LM"
NEAR = 0.05  # nats: two builds of one kernel may choose either of two tokens so close
SOME_END = -1  # which one it was is not told
_held: dict[str, Any] = {}


_told = partial(m.refused, PROGRAM, RuntimeError)


def _load(message: m.Load) -> m.Loaded:
    """`path` is the file."""
    lm.set_min_log_severity(lm.LogSeverity.ERROR)
    _held.clear()
    _constant.cache_clear()
    path = Path(message.path)
    _held.update(path=path, threads=message.threads)
    with _told("the file"):
        _held["context"] = int(lm.ModelInfo(str(path)).max_context_tokens)
    engine = _whole("engine")
    file = LitertLmFile(path)
    marks = {token["id"] for token in file.table().get("added_tokens", ())}
    begin = engine.bos_token_id
    ends = {ids[0] for ids in engine.eos_token_ids if len(ids) == 1}
    logits = file.model().output("decode", "logits")
    _held.update(marks=marks, front=[] if begin is None else [int(begin)], ends=ends, vocab=int(logits.shape[-1]))
    return m.Loaded(_held["context"], _held["vocab"])


def _whole(kind: str) -> Any:
    """The file in LiteRT-LM ("engine") or in the interpreter ("runtime"); the other one is let go."""
    if kind not in _held:
        for other in ("engine", "runtime"):
            if other in _held:
                _held.pop(other).close()
        if kind == "engine":
            _held[kind] = _engine(_held["path"])
        else:
            _held[kind] = open_litert_lm(Artifact.open(_held["path"].parent))
    return _held[kind]


def _engine(path: Path) -> Any:
    """With counts of what it reads and says; packed weights are kept nowhere."""
    cpu = lm.Backend.CPU(thread_count=_held["threads"])
    with _told("the file"):
        return lm.Engine(str(path), backend=cpu, cache_dir=":nocache", enable_benchmark=True)


def _tokens(text: str) -> list[int]:
    """As a session reads a text that is its first."""
    return _held["front"] + _encoded(text)


def _encoded(text: str) -> list[int]:
    if not text:
        return []
    with _told("a text"):
        return [int(token) for token in _reader().tokenize(text)]


def _decoded(tokens: list[int]) -> str:
    """Text of tokens, marks too."""
    return _reader().detokenize(tokens) if tokens else ""


def _reader() -> Any:
    """What has the file's tokenizer, and few weights."""
    return _held["engine"] if "engine" in _held else _constant(0)


def _chat(message: m.Chat) -> m.Prompted:
    before, last = list(message.messages[:-1]), message.messages[-1]
    engine = _whole("engine")
    try:
        with engine.create_conversation(
            messages=before,
            tools=list(map(_tool, message.tools)) or None,
            automatic_tool_calling=False,
            sampler_config=_sampler({}),
            max_output_tokens=1,
        ) as talk:
            text = talk.render_message_to_string(last)
            if not text:
                raise InputError(f"{PROGRAM} refuses the chat: its template gives no text")
            tokens = _tokens(text)
            if len(tokens) >= _held["context"]:
                return m.Prompted(text, tokens, None)
            talk.send_message(last)
            counted = talk.get_benchmark_info().last_prefill_token_count
    except RuntimeError as error:
        raise InputError(f"{PROGRAM} refuses the chat: {error}") from None
    return m.Prompted(text, tokens, int(counted))


def _tool(schema: dict[str, Any]) -> Any:
    """A tool that is told of and never called."""
    methods = {"get_tool_description": lambda self: schema, "execute": lambda self, param: None}
    return type("Told", (lm.Tool,), methods)()


def _distribute(message: m.Distribute) -> m.Distributed:
    """The interpreter's."""
    runtime: LitertLmRuntime = _whole("runtime")
    rows = [runtime.logits(message.tokens[: message.prefilled])[-1]]
    rows += [runtime.decode(token) for token in message.tokens[message.prefilled :]]
    return m.Distributed(_log_softmax(np.stack(rows)))


def _score(message: m.Score) -> m.Scored:
    """Log-probabilities of the tokens behind the first `prefilled`.

    `run_text_scoring` of 0.18.1 puts a prompt's last token in the place of the one before it, so it is given twice.
    """
    front, at = len(_held["front"]), message.prefilled
    _whole("engine")
    parts = (message.tokens[front : at - 1], message.tokens[at - 1 : at], message.tokens[at:])
    before, last, behind = map(_text, parts)
    with _session({}, 1) as session, _told("a text that it is to score"):
        for part in (before, last, last):
            if part:
                session.run_prefill([part])
        found = session.run_text_scoring([behind], store_token_lengths=True)
    if len(found.token_scores) != 1 or len(found.token_scores[0]) != len(parts[-1]):
        raise TargetError(f"{PROGRAM} scores {found.token_lengths} tokens instead of {len(parts[-1])}")
    return m.Scored(np.array(found.token_scores[0], np.float32))


def _answer(message: m.Answer) -> m.Answered:
    """One token more than asked for: where it came, nothing ended the answer. A draw's tokens are those of its text."""
    if message.begin is not None:
        return _ended(message.begin)
    front = _held["front"]
    if message.tokens[: len(front)] != front:
        raise InputError(f"{PROGRAM} begins every text with the token {front[0]}", fix="give tokens of a whole text")
    most = min(message.most + 1, _held["context"] - len(message.tokens))
    _whole("engine")
    with _session(message.options, most) as session, _told("the prompt"):
        rest = message.tokens[len(front) :]
        if rest:
            session.run_prefill([_text(rest)])
        text = "".join(text for part in session.run_decode_async() for text in part.texts)
        count = int(session.get_benchmark_info().last_decode_token_count)
    ended = count < most
    drawn = bool(message.options.get("temperature"))
    said = _encoded(text) if drawn else _followed(message.tokens, text, ended)
    said = [*said, SOME_END] if ended else said[: message.most]
    return m.Answered(_decoded(said[:-1] if ended else said), said, ended)


def _followed(prompt: list[int], text: str, ended: bool) -> list[int]:
    """The tokens of an answer, without the one that ended it.

    Raises:
        TargetError: the file's likeliest tokens have another text, or end it elsewhere.
    """
    runtime: LitertLmRuntime = _whole("runtime")
    said: list[int] = []
    row = runtime.logits(prompt)[-1]
    while True:
        likely = [int(token) for token in np.argsort(-row)[:20] if row[token] >= row.max() - NEAR]
        done = _whole_characters(_decoded(said)) == _whole_characters(text)
        if done and (not ended or any(token in _held["ends"] for token in likely)):
            return said
        token = next((token for token in likely if _begins(text, [*said, token])), None)
        if done or token is None:
            place = f"behind {len(prompt)} tokens and {len(said)} of its own"
            told = f"says {text[len(_decoded(said)) :]!r}" if not done else "ends"
            raise TargetError(f"{PROGRAM} {told} {place}, where the file's likeliest is {_decoded(likely[:1])!r}")
        said.append(token)
        row = runtime.decode(token)


def _begins(text: str, tokens: list[int]) -> bool:
    """Whether a text begins with these tokens, the last character of which may not be whole."""
    return text.startswith(_whole_characters(_decoded(tokens)))


def _whole_characters(text: str) -> str:
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def _text(tokens: list[int]) -> str:
    return spelled(tokens, _held["marks"], _decoded, _encoded, PROGRAM)


def _ended(token: int) -> m.Answered:
    """What becomes of an answer that is this token again and again, by a file whose model says nothing else."""
    most = 3
    engine = _constant(token)
    with _session({}, most, engine) as session, _told("the prompt"):
        session.run_prefill(["a"])
        text = session.run_decode().texts
        count = int(session.get_benchmark_info().last_decode_token_count)
    return m.Answered("".join(text), [token] * count, count < most)


@cache
def _constant(token: int) -> Any:
    path = Path(_scratch().name) / f"{token}.litertlm"
    write_constant(_held["path"], path, token, _held["vocab"])
    return _engine(path)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bluelm-runner-")


@contextmanager
def _session(options: dict[str, Any], most: int, engine: Any = None) -> Iterator[Any]:
    engine = engine or _whole("engine")
    with _told("a session"):
        session = engine.create_session(
            apply_prompt_template=False, sampler_config=_sampler(options), max_output_tokens=most
        )
    try:
        yield session
    finally:
        session.close()


def _sampler(options: dict[str, Any]) -> Any:
    """The likeliest token, or a draw from all."""
    if not options.get("temperature"):
        return lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
    told = {"temperature": float(options["temperature"]), "seed": int(options.get("seed", 0))}
    return lm.SamplerConfig(top_k=_held["vocab"], top_p=1.0, **told)


def _log_softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return (wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))).astype(np.float32)


if __name__ == "__main__":
    serve(m.handler(_load, _tokens, _chat, _distribute, _answer, _score), sys.argv)
