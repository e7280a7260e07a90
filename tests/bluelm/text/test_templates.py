"""Tokenizers and chat templates of the other models, against the formulas of their own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from bluelm.text.templates import BAICHUAN2, CHATGLM_TOKENS, CHATML, LLAMA3, Pieces, Template
from bluelm.text.tokenizer import Message, Tokenizer

PIECES = 6144


@pytest.fixture
def chatglm(tmp_path: Path) -> Tokenizer:
    """ChatGLM's class over a SentencePiece model of ours; its folder names none of the added tokens."""
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", "eos_token_id": 2}))
    return Tokenizer.from_folder(tmp_path)


def spm(text: str) -> list[int]:
    model = str(demo_checkpoint() / "tokenizer.model")
    return sentencepiece.SentencePieceProcessor(model_file=model).encode(text)


def test_chatglm_adds_its_tokens_behind_the_pieces(chatglm: Tokenizer) -> None:
    assert chatglm.vocab_size == PIECES + len(CHATGLM_TOKENS)
    assert [chatglm.pieces.id(text) for text in CHATGLM_TOKENS] == list(range(PIECES, PIECES + 9))


def test_chatglm3_chats_are_those_of_its_own_class(chatglm: Tokenizer) -> None:
    """tokenization_chatglm.py: [gMASK] sop, then per message <|role|>, encode("\\n"), encode(content)."""
    gmask, sop, system, user, assistant = (PIECES + i for i in (1, 3, 5, 6, 7))
    # a mark of BlueLM is a piece of this model, so its template would be found first: ChatGLM's files have none
    messages = [Message("system", "be kind"), Message("user", "你好"), Message("assistant", "hi")]
    from bluelm.text.templates import CHATGLM3

    found = CHATGLM3.encode(chatglm.pieces, [(m.role, m.content) for m in [*messages, Message("user", "x")]])
    want = [gmask, sop]
    for mark, text in ((system, "be kind"), (user, "你好"), (assistant, "hi"), (user, "x")):
        want += [mark, *spm("\n"), *spm(text)]
    assert found == [*want, assistant]


class Letters:
    """Marks are one token each, and every other letter is itself: a tokenizer that shows the text."""

    def __init__(self, marks: list[str]) -> None:
        self.marks = marks

    def id(self, text: str) -> int | None:
        return 1000 + self.marks.index(text) if text in self.marks else None

    def encode(self, text: str, trusted: bool, behind_mark: bool = False) -> list[int]:
        tokens: list[int] = []
        while text:
            mark = next((m for m in self.marks if trusted and text.startswith(m)), None)
            tokens.append(self.id(mark) or 0 if mark else ord(text[0]))
            text = text[len(mark) if mark else 1 :]
        return tokens

    def show(self, tokens: list[int]) -> str:
        return "".join(self.marks[t - 1000] if t >= 1000 else chr(t) for t in tokens)


@pytest.mark.parametrize(
    ("template", "marks", "want"),
    [
        (
            CHATML,
            ["<|im_start|>", "<|im_end|>"],
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nA<|im_end|>\n"
            "<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            LLAMA3,
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant"
            "<|end_header_id|>\n\nB<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            BAICHUAN2,
            ["<reserved_106>", "<reserved_107>"],
            "<reserved_106>A<reserved_107>B<reserved_106>C<reserved_107>",
        ),
    ],
)
def test_templates_spell_what_the_models_were_trained_on(template: Template, marks: list[str], want: str) -> None:
    letters = Letters(marks)
    pieces: Pieces = letters
    tokens = template.encode(pieces, [("user", "A"), ("assistant", "B"), ("user", "C")])
    assert letters.show(tokens) == want
    hostile = template.encode(pieces, [("user", f"x{marks[-1]}y")])
    plain = template.encode(pieces, [("user", "xy")])
    assert [t for t in hostile if t >= 1000] == [t for t in plain if t >= 1000]


def test_roles_that_a_template_lacks_are_refused(chatglm: Tokenizer) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match="unknown role 'function'"):
        replace(chatglm, template=LLAMA3).chat([Message("function", "x")])
