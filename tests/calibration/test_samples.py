"""Windows and the report: what is in them, that they repeat, and what they warn of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from calibration.describe import in_languages, model_languages, shares, warnings
from calibration.samples import load_samples
from calibration.sources import BUNDLED
from tests.support.checkpoints.words import write_tokenizer

HELDOUT = Path(__file__).parents[2] / "eval" / "data" / "heldout.jsonl"
ENGLISH = "The quick brown fox jumps over the lazy dog and runs into the forest.\n"
CHINESE = "敏捷的棕色狐狸跳过了懒狗，跑进了森林里去。\n"
CODE = "def add(a, b):\n    return a + b;\nfor (int i = 0; i < 3; i++) {\n    x[i] = 1;\n}\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(demo_checkpoint())


def text_file(folder: Path, text: str) -> Sequence[Path]:
    (folder / "a.txt").write_text(text, encoding="utf-8")
    return [folder / "a.txt"]


def test_bundled_set_fills_128_windows_of_512(tokenizer: Tokenizer) -> None:
    samples = load_samples(None, tokenizer, 128, 512, 0)
    assert samples.tokens.shape == (128, 512)
    assert samples.tokens.dtype == torch.int64
    assert int(samples.tokens.max()) < tokenizer.vocab_size
    report = samples.report
    assert report.name == "bundled"
    assert len(report.sha256) == 64
    assert report.tokens == 128 * 512
    assert report.warnings == ()
    assert min(report.chinese, report.english, report.code, report.chat, 1 - report.chat) > 0.05
    json.dumps(report.to_json())


def test_every_window_begins_with_bos_once(tokenizer: Tokenizer) -> None:
    tokens = load_samples(None, tokenizer, 16, 128, 0).tokens
    assert (tokens[:, 0] == tokenizer.bos).all()
    assert (tokens[:, 1] != tokenizer.bos).all()


def test_seed_decides_and_repeats(tokenizer: Tokenizer) -> None:
    first, again, other = (load_samples(None, tokenizer, 8, 64, seed).tokens for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_windows_come_from_all_over_a_long_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    half = 20_000
    paths = text_file(tmp_path, ENGLISH * (half // len(ENGLISH)) + CHINESE * (half // len(CHINESE)))
    report = load_samples(paths, tokenizer, 8, 64, 0).report
    assert min(report.chinese, report.english) > 0.2


def test_bundled_texts_are_of_sources_that_may_be_shipped() -> None:
    allowed = {
        BUNDLED: {"d2l_zh", "rust_zh", "vue_zh", "poetry", "gsm8k", "shakespeare"},
        HELDOUT: {"rust_examples_zh", "mmengine_zh", "poetry", "gsm8k", "shakespeare", "union", "humaneval"},
    }
    for path, known in allowed.items():
        sources = {json.loads(line)["source"] for line in path.read_text(encoding="utf-8").split("\n") if line}
        assert sources == known
        notice = path.with_name("NOTICE").read_text(encoding="utf-8")
        assert all(f"| {source} |" in notice for source in sources)


def test_conversations_carry_the_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": ENGLISH, "response": CHINESE}), encoding="utf-8")
    samples = load_samples([path], tokenizer, 1, 512, 0)
    chat = tokenizer.encode("[|Human|]:", marks=True)
    assert chat == samples.tokens[0, 1 : 1 + len(chat)].tolist()
    assert samples.tokens[0, -1] == tokenizer.eos
    assert samples.report.chat == 1.0


def test_small_set_gives_what_it_has_and_warns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = load_samples(text_file(tmp_path, ENGLISH), tokenizer, 4, 512, 0)
    assert samples.tokens.shape[0] == 1
    assert 2 <= samples.tokens.shape[1] < 512
    assert any("4 of 512 were asked for" in line for line in samples.report.warnings)


def test_text_shorter_than_a_token_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = text_file(tmp_path, "a")
    with pytest.raises(InputError, match="shorter than a token"):
        load_samples(paths, replace(tokenizer, front=()), 1, 8, 0)


@pytest.mark.parametrize(("count", "length"), [(0, 8), (1, 1), (-1, 8)])
def test_nonsense_counts_are_refused(tokenizer: Tokenizer, count: int, length: int) -> None:
    with pytest.raises(InputError, match="cannot make"):
        load_samples(None, tokenizer, count, length, 0)


def test_unknown_role_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "narrator", "content": "x"}]}))
    with pytest.raises(InputError, match="narrator"):
        load_samples([path], tokenizer, 1, 8, 0)


@pytest.mark.parametrize(
    ("text", "chinese", "english", "code"),
    [
        (ENGLISH, 0, 1, 0),
        (CHINESE, 1, 0, 0),
        (CODE, 0, 0, 1),
        (f"说明：\n```python\n{CODE}```\n", 0.05, 0, 0.95),
        ("1234 5678 ...", 0, 0, 0),
        ("Привет, как дела", 0, 0, 0),
    ],
)
def test_shares(text: str, chinese: float, english: float, code: float) -> None:
    found = shares([text])
    assert (found.chinese, found.english, found.code) == pytest.approx((chinese, english, code), abs=0.05)


def test_verse_that_ends_in_semicolons_is_not_code() -> None:
    assert (
        shares(["And yet, I warrant, it had upon its brow\nA bump as big as a stone;\nA perilous knock;\n"]).code == 0
    )


def test_missing_language_and_template_are_warned_of(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert model_languages(tokenizer) == ("Chinese", "English")
    english = load_samples(text_file(tmp_path, ENGLISH * 40), tokenizer, 2, 64, 0).report
    assert ["Chinese" in line for line in english.warnings] == [True, False]
    assert "chat template" in english.warnings[1]
    chinese = load_samples(text_file(tmp_path, CHINESE * 40), tokenizer, 2, 64, 0).report
    assert "English" in chinese.warnings[0]


def test_the_bundled_set_is_the_models_languages(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A model whose vocabulary has no Chinese is calibrated with none, and is told so; the user's own text is his."""
    write_tokenizer(tmp_path, ENGLISH)
    english = Tokenizer.from_folder(tmp_path)
    assert model_languages(english) == ("English",)
    ours = load_samples(None, english, 16, 64, 0).report
    assert ours.chinese < 0.01 < 0.8 < ours.english and ours.name == "bundled without Chinese"
    assert "without its Chinese text: the model's vocabulary holds hardly any Chinese" in ours.warnings[0]
    users = load_samples(text_file(tmp_path, CHINESE * 40), english, 2, 64, 0).report
    assert users.chinese > 0.9 and not any("bundled" in line for line in users.warnings)
    both = load_samples(None, tokenizer, 64, 64, 0).report
    assert both.name == "bundled" and both.chinese > 0.2 and both.warnings == ()


def test_texts_of_another_language_are_left_out() -> None:
    texts = [ENGLISH, CHINESE, CODE, f"# {CHINESE}{CODE}" * 3, "1234"]

    def kept(*languages: str) -> tuple[int, ...]:
        return in_languages(texts, languages, "it").kept

    assert kept("English") == (0, 2, 4) and kept("Chinese") == (1, 2, 3, 4)
    assert kept("Chinese", "English") == kept() == (0, 1, 2, 3, 4)


def test_model_without_chinese_is_not_asked_for_it() -> None:
    assert warnings(shares([ENGLISH]), chat=1.0, languages=("English",)) == []
