"""Held-out text as windows, with the demo model's real tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest

from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from calibration.describe import shares
from calibration.sources import Document
from eval import heldout
from tests.support.checkpoints import words
from tests.support.files.tokenizers import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(demo_checkpoint())


@pytest.fixture(scope="module")
def bundled(tokenizer: Tokenizer) -> heldout.HeldOut:
    return heldout.load([], tokenizer)


def test_bundled_windows_fit_and_begin_as_texts_do(bundled: heldout.HeldOut, tokenizer: Tokenizer) -> None:
    for window in bundled.windows:
        assert len(window.tokens) <= heldout.LENGTH
        assert window.tokens[0] == tokenizer.bos
        np.testing.assert_array_equal(window.judged, window.tokens != tokenizer.bos)


def test_bundled_set_is_large_enough_and_has_every_domain(bundled: heldout.HeldOut) -> None:
    assert set(bundled.judged) == {"zh", "en", "code", "math"}
    assert sum(bundled.judged.values()) > 20_000


def test_the_bundled_text_is_the_models_languages(tmp_path: Path, bundled: heldout.HeldOut) -> None:
    words.write_tokenizer(tmp_path, "The quick brown fox jumps over the lazy dog.")
    found = heldout.load([], Tokenizer.from_folder(tmp_path))
    assert set(found.judged) == {"en", "code", "math"} and found.source == "bundled without Chinese"
    assert shares(found.texts).chinese < 0.01 and len(found.texts) > 200
    assert "the text to judge on is the bundled one without its Chinese text" in found.notes[0]
    assert found.digest != bundled.digest and bundled.notes == () and bundled.source == "bundled"


def test_every_beginning_has_the_domains_in_their_shares(bundled: heldout.HeldOut) -> None:
    total = sum(bundled.judged.values())
    front = bundled.first(8192)
    assert 8192 <= sum(int(w.judged[1:].sum()) for w in front) < 8192 + heldout.LENGTH
    for domain, count in bundled.judged.items():
        share = sum(int(w.judged[1:].sum()) for w in front if w.domain == domain) / 8192
        assert share == pytest.approx(count / total, abs=0.05)


def test_no_text_is_lost_or_doubled(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["One two three four five six seven. " * 40, "短い。", "另一段文字，长一些。" * 10]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    found = heldout.load([path], tokenizer, length=32)
    assert {w.domain for w in found.windows} == {"mine"}
    expected = [token for text in texts for token in tokenizer.encode(text)]
    judged = sorted(int(t) for w in found.windows for t in w.tokens[w.judged])
    assert len(expected) - 16 <= len(judged) <= len(expected)  # a short rest may be left out
    remaining = sorted(expected)
    for token in judged:
        remaining.remove(token)


def test_same_seed_same_windows(tokenizer: Tokenizer, bundled: heldout.HeldOut) -> None:
    again = heldout.load([], tokenizer)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(bundled.windows, again.windows, strict=True))
    other = heldout.load([], tokenizer, seed=1)
    assert not all(np.array_equal(a.tokens, b.tokens) for a, b in zip(bundled.windows, other.windows, strict=True))


def test_chats_are_judged_in_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": "How are you today, my friend?", "response": "Well."}))
    (window,) = heldout.load([path], tokenizer).windows
    assert tokenizer.decode(window.tokens.tolist()).startswith("[|Human|]:")


def test_a_chat_begins_as_its_template_says(tmp_path: Path) -> None:
    """A tokenizer that begins a text with bos, and a template that does not write it: no chat of the model has one."""
    write_tokenizer(tmp_path, "llama-bpe")
    named = {"bos_token": "<|begin|>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    ours = Tokenizer.from_folder(tmp_path)
    chat = Document(messages=({"role": "user", "content": "How are you?"},))
    (said,) = heldout.pack([chat], "a", ours, 64)
    (text,) = heldout.pack([Document(text="How are you?")], "a", ours, 64)
    assert ours.front == (321,) and text.tokens.tolist() == [321, *said.tokens.tolist()]
    assert said.judged.tolist() == [False, *text.judged.tolist()[2:]]


@pytest.mark.parametrize("content", [None, "", "  \n"])
def test_no_text_is_bad_input(tokenizer: Tokenizer, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"mine\.txt"):
        heldout.load([path], tokenizer)
