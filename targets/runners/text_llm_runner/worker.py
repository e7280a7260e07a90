"""The child process that holds ExecuTorch's TextLLMRunner, its tokenizer, and ExecuTorch's runtime on the same program.

TextLLMRunner takes text and says text: ids of a text are those of the library that it is built with, and those of an
answer are followed in the runtime, which must find each piece of text likeliest. Chats are rendered by transformers
from the files beside the program. All weights are held once: either TextLLMRunner has them or the runtime.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bluelm.errors import InputError, TargetError
from targets.arm64.program import load_program, methods
from targets.host.child import serve
from targets.runners import messages as m
from targets.runners.spelling import spelled

llm: Any = importlib.import_module("executorch.extension.llm.runner")
library: Any = importlib.import_module("pytorch_tokenizers")
TABLES = {"tokenizer.json": library.CppHFTokenizer, "tokenizer.model": library.CppSPTokenizer}
FORWARD = "forward"
CONTEXT, STEP, VOCABULARY = "get_max_context_len", "get_max_seq_len", "get_vocab_size"
_held: dict[str, Any] = {}


_told = partial(m.refused, "TextLLMRunner", RuntimeError)


def _load(message: m.Load) -> m.Loaded:
    """`path` is the program."""
    torch.set_num_threads(message.threads)
    _held.clear()
    _transformers.cache_clear()
    model = Path(message.path)
    table = next((path for path in map(model.with_name, TABLES) if path.is_file()), None)
    if table is None:
        raise TargetError("TextLLMRunner needs tokenizer.json or tokenizer.model beside the program", where=model)
    with _told("the tokenizer"):
        tokenizer = TABLES[table.name]()
        tokenizer.load(str(table))
    with _told("the program"):
        program = load_program(model)
        told = {name: program.load_method(name)([]) for name in methods(program) if name != FORWARD}
    _held.update(model=model, table=table, tokenizer=tokenizer, told=told)
    _whole("runner")
    missing = sorted({CONTEXT, STEP, VOCABULARY} - told.keys())
    if missing:
        raise TargetError(f"the program has no method {missing[0]!r}", where=model)
    return m.Loaded(int(told[CONTEXT][0]), int(told[VOCABULARY][0]))


def _whole(kind: str) -> Any:
    """The program in TextLLMRunner ("runner") or as a method of the runtime ("method"); the other one is let go."""
    if kind not in _held:
        for other in ("runner", "method", "program"):
            _held.pop(other, None)
        with _told("the program"):
            if kind == "runner":
                _held[kind] = llm.TextLLMRunner(str(_held["model"]), str(_held["table"]))
            else:
                program = load_program(_held["model"])
                _held.update(program=program, method=program.load_method(FORWARD))
    return _held[kind]


def _tokens(text: str, begins: bool = True) -> list[int]:
    with _told("a text"):
        return [int(token) for token in _held["tokenizer"].encode(text, bos=int(begins))]


def _chat(message: m.Chat) -> m.Prompted:
    """An answer at the end is continued."""
    answered = message.messages[-1]["role"] == "assistant"
    ends = {"add_generation_prompt": not answered, "continue_final_message": answered}
    told = {"tools": list(message.tools) or None, **ends}
    try:
        text = _transformers().apply_chat_template(list(message.messages), tokenize=False, **told)
    except Exception as error:  # noqa: BLE001  (of Jinja and of transformers, each with its own kinds)
        raise InputError(f"the template beside the program does not give the chat: {error}") from None
    tokens = _tokens(text, begins=False)
    counted = _said(_whole("runner"), text, 1)[1] if len(tokens) < _held["told"][CONTEXT][0] else None
    return m.Prompted(text, tokens, counted)


@cache
def _transformers() -> Any:
    """The tokenizer of the folder, for its template."""
    reader: Any = importlib.import_module("transformers").AutoTokenizer
    return reader.from_pretrained(_held["model"].parent, local_files_only=True)


def _said(runner: Any, text: str, most: int) -> tuple[list[str | None], int]:
    """Pieces of the likeliest answer, the end token's too, and how many tokens the prompt was.

    Its binding cannot give a part of a character: from the first such piece on they are only counted, and None.
    """
    pieces: list[str | None] = []
    counts: list[tuple[int, int]] = []
    config = llm.GenerationConfig(echo=False, max_new_tokens=most, temperature=0.0, num_bos=0)
    for listen in (pieces.append, None):
        with _told("the prompt"), suppress(UnicodeDecodeError):
            runner.reset()
            runner.generate(
                text, config, listen, lambda s: counts.append((s.num_prompt_tokens, s.num_generated_tokens))
            )
            break
    prompt, generated = counts[-1]
    return pieces + [None] * (generated + 1 - len(pieces)), prompt  # it does not count the first one


def _run(tokens: list[int], start: int) -> NDArray[np.float32]:
    """Logits [vocab] behind the last of the tokens, whose first has position `start`; in steps as TextLLMRunner's."""
    step = int(_held["told"][STEP][0])
    logits: Any = None
    for at in range(0, len(tokens), step):
        part = torch.tensor([tokens[at : at + step]])
        with _told("the tokens"):
            logits = _whole("method")([part, torch.tensor([start + at])])[0]
    return logits[0, -1].float().numpy()


def _distribute(message: m.Distribute) -> m.Distributed:
    rows = [_run(message.tokens[: message.prefilled], 0)]
    rows += [_run([message.tokens[at]], at) for at in range(message.prefilled, len(message.tokens))]
    logits = np.stack(rows).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return m.Distributed((logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32))


def _answer(message: m.Answer) -> m.Answered:
    """One token more than asked for: where it came, nothing ended the answer."""
    if message.options.get("temperature"):
        fix = "omit --temperature"
        raise InputError("TextLLMRunner draws by the clock, so that no answer comes a second time", fix=fix)
    if message.begin is not None:
        return _ended(message.begin)
    room = int(_held["told"][CONTEXT][0]) - len(message.tokens)
    most = min(message.most + 1, room)
    pieces, _ = _said(_whole("runner"), _text(message.tokens), most)
    ended = len(pieces) < most
    said = _followed(message.tokens, pieces)[: None if ended else message.most]
    return m.Answered(_decoded(said[:-1] if ended else said), said, ended)


def _followed(prompt: list[int], pieces: list[str | None]) -> list[int]:
    """The tokens of an answer.

    Raises:
        TargetError: the program's likeliest token has another text.
    """
    said: list[int] = []
    logits = _run(prompt, 0)
    for piece in pieces:
        token = int(logits.argmax())
        text = _piece(token)
        if piece is not None and text != piece:
            place = f"behind {len(prompt)} tokens and {len(said)} of its own"
            raise TargetError(f"TextLLMRunner says {piece!r} {place}, where the program's likeliest is {text!r}")
        said.append(token)
        logits = _run([token], len(prompt) + len(said) - 1)
    return said


def _piece(token: int) -> str | None:
    """Its text as TextLLMRunner says it; None for a part of a character."""
    with _told("a token"), suppress(UnicodeDecodeError):
        return _held["tokenizer"].decode(token)
    return None


def _decoded(tokens: list[int]) -> str:
    """Text of tokens, marks too."""
    return _transformers().decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _text(tokens: list[int]) -> str:
    """A text that is read as these tokens.

    Raises:
        InputError: none was found; TextLLMRunner takes nothing but text.
    """
    reader = _transformers()
    marks = set(reader.all_special_ids) | set(reader.added_tokens_decoder)
    return spelled(tokens, marks, _decoded, partial(_tokens, begins=False), "TextLLMRunner")


def _ended(token: int) -> m.Answered:
    """What becomes of an answer of this token alone, by a program that tells of itself what the artifact's does.

    Its first token is never looked at, so the second one is where it may end.
    """
    most = 3
    told = tuple((name, tuple(answers)) for name, answers in sorted(_held["told"].items()))
    pieces, _ = _said(llm.TextLLMRunner(str(_constant(token, told)), str(_held["table"])), "a", most)
    return m.Answered("", [token] * len(pieces), len(pieces) < most)


@cache
def _constant(token: int, told: tuple[tuple[str, tuple[Any, ...]], ...]) -> Path:
    """A program whose likeliest token is always this one; `told`: what its other methods answer."""
    from executorch.exir import to_edge

    answers: dict[str, Any] = {name: found[0] if len(found) == 1 else list(found) for name, found in told}
    row = torch.nn.functional.one_hot(torch.tensor(token), answers[VOCABULARY]).float()
    example = (torch.zeros(1, 2, dtype=torch.long), torch.tensor([0]))
    tokens = torch.export.Dim("tokens", min=1, max=8)
    program = torch.export.export(_Constant(row), example, dynamic_shapes=({1: tokens}, {}))
    path = Path(_scratch().name) / f"{token}-{hash(told)}.pte"
    path.write_bytes(to_edge(program, constant_methods=answers).to_executorch().buffer)
    return path


class _Constant(torch.nn.Module):
    """forward(tokens int64 [1, T], start int64 [1]) -> float32 [1, T, vocab], the same row everywhere."""

    row: torch.Tensor

    def __init__(self, row: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("row", row)

    def forward(self, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return ((tokens + start) * 0).unsqueeze(-1) + self.row


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bluelm-runner-")


if __name__ == "__main__":
    serve(m.handler(_load, _tokens, _chat, _distribute, _answer), sys.argv)
