"""What `quantize --format` writes is whole: a server opens the folder and finds tokens, template and end tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from tests.support.checkpoints.shapes import train_tokenizer, write_checkpoint
from tests.support.command_line import call

CHAT = (
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello there.\n"},
    {"role": "user", "content": "  2026, two\n\n\tthings 😀"},
)
TEXTS = ("The small model answers.", "你好，世界 2026\n\tx", "  two spaces", "[|AI|]:", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served") / "gptq"
    assert call("quantize", demo_checkpoint(), made, "--method", "rtn", "--format", "gptq") == 0
    return made


def test_transformers_chats_from_the_folder_as_the_checkpoint_does(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_folder(demo_checkpoint())
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text, bos=True, marks=True), text
    for count in (1, 3):
        turns = list(CHAT[:count])
        found = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert found == ours.chat(turns), turns
    assert (folder / "tokenizer.json").is_file()
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    config = json.loads((demo_checkpoint() / "config.json").read_text())
    assert config["eos_token_id"] in ends


def test_the_folder_is_read_again_with_the_same_tokens(folder: Path) -> None:
    again, ours = Tokenizer.from_folder(folder), Tokenizer.from_folder(demo_checkpoint())
    for text in TEXTS:
        assert again.encode(text, bos=True, marks=True) == ours.encode(text, bos=True, marks=True), text
    assert again.chat(list(CHAT)) == ours.chat(list(CHAT))


def test_a_tokenizer_that_tokenizer_json_cannot_hold_goes_along_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path / "model", layers=1)
    (model / "tokenizer.model").write_bytes(train_tokenizer(model_type="unigram"))
    assert call("quantize", model, tmp_path / "out", "--method", "rtn", "--format", "gptq") == 0
    assert "no tokenizer.json was made, which servers ask for" in capfd.readouterr().err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.model", "tokenizer_config.json", "generation_config.json"} <= names
    assert "tokenizer.json" not in names
