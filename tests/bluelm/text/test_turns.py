"""Chats as three texts: those of the template itself, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from bluelm.errors import TargetError
from bluelm.system.files import demo_checkpoint
from bluelm.text.templates import FILE
from bluelm.text.tokenizer import Message, Tokenizer
from bluelm.text.turns import Turns, turns_of
from tests.support.files.tokenizers import write_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|begin|>system\nBe brief.<|end|>\n{% endif %}"
    "{{ '<|begin|>' + m.role + '\n' + m.content | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"
)
OTHERS = {
    "{{ messages[-1].content }}": "leaves out or repeats",
    CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"): "in front of an answer",
    CHATML.replace("'<|end|>\n' }}", "('<|end|>\n' if messages | length < 5 else '') }}"): "of 5 turns",
    "{% if messages | length > 1 %}{{ raise_exception('once') }}{% endif %}{{ messages[0].content }}": "once",
}


def of(folder: Path, source: str) -> Tokenizer:
    write_tokenizer(folder, "qwen2")
    (folder / FILE).write_text(source)
    return Tokenizer.from_folder(folder)


def test_bluelms_own() -> None:
    template = Tokenizer.from_folder(demo_checkpoint()).template
    assert template is not None
    assert turns_of(template) == Turns("<s>[|Human|]:", "[|AI|]:", "</s>[|Human|]:")


def test_a_template_in_a_file_is_followed_as_transformers_renders_it(tmp_path: Path) -> None:
    ours = of(tmp_path, CHATML)
    assert ours.template is not None
    turns = turns_of(ours.template)
    assert turns.next == "<|end|>\n<|begin|>user\n" and turns.first.startswith("<|begin|>system\nBe brief.")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    said = ("Where?", "There: {{ x }}", "Why", "So", "And 你好")
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    assert turns.text(said) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = ours.chat([Message(m["role"], m["content"]) for m in messages])
    assert ours.encode(turns.text(said), marks=True) == tokens


@pytest.mark.parametrize(("source", "why"), OTHERS.items(), ids=OTHERS.values())
def test_a_template_of_other_chats_is_refused_with_the_reason(source: str, why: str, tmp_path: Path) -> None:
    template = of(tmp_path, source).template
    assert template is not None
    with pytest.raises(TargetError, match=why):
        turns_of(template)
