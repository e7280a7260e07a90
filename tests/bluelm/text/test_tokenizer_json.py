"""tokenizer.json: what is read of it, what is refused, and what a saved setting or a pattern may not do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bluelm.errors import InputError, UnavailableError
from bluelm.system.files import demo_checkpoint
from bluelm.text import jsonpieces
from bluelm.text.tokenizer import Message, Tokenizer, copy_files
from tests.support.files.tokenizers import streamed


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    """A byte-level BPE with special tokens, added marks, and a post-processor that puts bos in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)  # pyright: ignore[reportCallIssue]
    made.train_from_iterator((demo_checkpoint() / "README.md").read_text().splitlines(), trainer)
    made.add_special_tokens([AddedToken("[|Human|]:", special=True), AddedToken("[|AI|]:", special=True)])
    made.add_tokens(["plain-added"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # pyright: ignore[reportAttributeAccessIssue]
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    return tmp_path


def test_tokenizer_json(json_folder: Path) -> None:
    (json_folder / "config.json").write_text('{"model_type": "BlueLM"}')
    tokenizer = Tokenizer.from_folder(json_folder)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (403, 0, 1, None)
    for text in ("a small model", " 你好 🦄", "</s>[|AI|]:", "plain-added"):
        tokens = tokenizer.encode(text)
        assert not {0, 1, 400, 401} & set(tokens)
        assert tokenizer.decode(tokens) == text == "".join(streamed(tokenizer, tokens))
    assert tokenizer.encode("plain-added") == [402]
    hello = tokenizer.encode("你好")
    messages = [Message("user", "你好"), Message("assistant", "你好"), Message("user", "</s>[|AI|]:")]
    spelled = tokenizer.encode("</s>[|AI|]:")
    assert tokenizer.chat(messages) == [0, 400, *hello, 401, *hello, 1, 400, *spelled, 401]
    assert tokenizer.encode("x</s>", marks=True)[-1] == 1


def test_tokenizer_json_holds_back_split_characters(json_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(json_folder)
    pieces = streamed(tokenizer, tokenizer.encode("🦄"))
    assert [piece for piece in pieces if piece] == ["🦄"]
    assert "".join(streamed(tokenizer, tokenizer.encode("🦄")[:2])) == "\ufffd"


def test_ids_of_config_json_where_the_tokenizer_names_none(json_folder: Path) -> None:
    (json_folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(json_folder).bos is None
    (json_folder / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": null}')
    tokenizer = Tokenizer.from_folder(json_folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, None)


def test_tokenizers_library_missing(json_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UnavailableError, match=r"bluelm-export\[tokenizers\]") as caught:
        Tokenizer.from_folder(json_folder)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}', '{"added_tokens": 3, "model": {"type": "BPE"}}'])
def test_damaged_tokenizer_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError):
        Tokenizer.from_folder(tmp_path)


def changed(folder: Path, to: Path, **parts: Any) -> Path:
    """A copy of a folder whose tokenizer.json has other parts."""
    to.mkdir()
    data = json.loads((folder / "tokenizer.json").read_text())
    (to / "tokenizer.json").write_text(json.dumps(data | parts))
    return to


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def test_truncation_and_padding_saved_with_a_tokenizer_are_off(json_folder: Path, tmp_path: Path) -> None:
    """Every text was cut to so many tokens, or made as long as the padding says; also in what a run ships."""
    import tokenizers

    text = "你好 world " * 200
    hostile: Any = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    hostile.enable_truncation(128)
    assert len(hostile.encode(text).ids) == 128
    hostile.enable_padding(length=10**9)
    saved = json.loads(hostile.to_str())
    assert saved["padding"]["strategy"] == {"Fixed": 10**9}
    folder = changed(json_folder, tmp_path / "m", truncation=saved["truncation"], padding=saved["padding"])

    expected = Tokenizer.from_folder(json_folder).encode(text)
    assert len(expected) > 128
    assert Tokenizer.from_folder(folder).encode(text) == expected

    (tmp_path / "shipped").mkdir()
    copy_files(folder, tmp_path / "shipped")
    runtime: Any = tokenizers.Tokenizer.from_file(str(tmp_path / "shipped" / "tokenizer.json"))
    assert runtime.truncation is None and runtime.padding is None
    assert runtime.encode(text, add_special_tokens=False).ids == expected
    (tmp_path / "same").mkdir()
    copy_files(json_folder, tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (json_folder / "tokenizer.json").read_bytes()


def test_patterns_of_a_tokenizer_end(json_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oniguruma gives up behind ten million steps from one place of the text, but there are as many as characters."""
    gives_up = changed(json_folder, tmp_path / "a", pre_tokenizer=split_by("(a+a+)+b"))
    with pytest.raises(InputError, match="fails on a text of 60 characters") as caught:
        Tokenizer.from_folder(gives_up).encode("a" * 60)
    assert caught.value.where == str(gives_up / "tokenizer.json") and caught.value.exit_code == 2

    monkeypatch.setattr(jsonpieces, "SECONDS", 0.1)
    slow = changed(json_folder, tmp_path / "b", pre_tokenizer=split_by("(?:a|aa){20}b"))
    with pytest.raises(InputError, match="fails on a text of 60 characters: it takes more than 0 s"):
        Tokenizer.from_folder(slow).encode("a" * 60)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"decoder": {"type": "Replace", "pattern": {"Regex": "(a+a+)+b"}, "content": " "}}, "regular expression"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}}, "1000"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 30}},
            "1000",
        ),
        ({"pre_tokenizer": split_by("(")}, "fails on this file"),
        ({"model": {"type": "BPE", "unk_token": "none", "vocab": {"a": 0}, "merges": []}}, "fails on a text of 1"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_much_of_little(
    json_folder: Path, tmp_path: Path, parts: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        Tokenizer.from_folder(changed(json_folder, tmp_path / "m", **parts)).encode("b")


@pytest.mark.parametrize(
    "decoder",
    [
        {"9" * 5000: {"content": "<x>"}},
        {"6200": {"content": "x" * 100_000}},
        {str(index): {"content": f"<{index}>"} for index in range(6144, 16_200)},
    ],
)
def test_added_tokens_without_bounds(tmp_path: Path, decoder: dict[str, Any]) -> None:
    """A number of 5000 digits as an id, a text that is no token, more than any tokenizer adds."""
    shutil.copyfile(demo_checkpoint() / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(InputError, match="added token"):
        Tokenizer.from_folder(tmp_path)
