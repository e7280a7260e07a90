"""The tokenizer that TextLLMRunner reads: the checkpoint's tokens in its own reader, refusals, damages told."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bluelm.errors import TargetError
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from eval.runner.texts import HARD
from export.artifacts.artifact import Artifact
from export.tokenizer.llm_runner import READ, check_tokenizer, write_tokenizer
from export.tokenizer.readback_llm_runner import faults
from tests.support.checkpoints.shapes import train_tokenizer

library: Any = importlib.import_module("pytorch_tokenizers")  # has no annotations
TEXTS = (
    *HARD,
    "<0x41><unk>",
    " " * 200 + "x",
    "literal ▁▁marks▁",
    "é\u0301 \u00a0nb\u3000wide",
    "x</s>y<s>",
    "山" * 900,
)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Of the demo."""
    (tmp_path / "made").mkdir()
    assert set(write_tokenizer(tmp_path / "made", demo_checkpoint(), 64)) == {"tokenizer.json", "tokenizer_config.json"}
    return tmp_path / "made"


def reader(folder: Path) -> Any:
    found = library.CppHFTokenizer()
    found.load(str(folder / "tokenizer.json"))
    return found


def test_its_reader_reads_the_checkpoints_tokens(made: Path) -> None:
    ours, theirs = Tokenizer.from_folder(demo_checkpoint()), reader(made)
    for text in TEXTS:
        assert list(theirs.encode(text, bos=1)) == ours.encode(text, bos=True, marks=True), text
        assert list(theirs.encode(text)) == ours.encode(text, marks=True), text
    assert [theirs.decode(token) for token in (5, 300)] == ["[|AI|]:", " in"]


def test_pieces_with_a_space_of_their_own(tmp_path: Path) -> None:
    """A dummy prefix, as of Llama's pieces: words keep their spaces, token by token."""
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(add_dummy_prefix=True))
    (tmp_path / "made").mkdir()
    write_tokenizer(tmp_path / "made", tmp_path, 64)
    ours, theirs = Tokenizer.from_folder(tmp_path), reader(tmp_path / "made")
    for text in ("the model", "a\nb", "你好 the", "", "  two", "the</s>model"):
        found = list(theirs.encode(text, bos=1))
        assert found == ours.encode(text, bos=True, marks=True), text
    assert "".join(theirs.decode(token) for token in ours.encode("the model")) == " the model"


def test_what_it_cannot_read_is_refused_by_the_plan(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(model_type="unigram"))
    with pytest.raises(TargetError, match="no SentencePiece model but BPE"):
        check_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    table = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    path = made / "tokenizer.json"
    for part, kind in (("normalizer", "Lowercase"), ("pre_tokenizer", "Whitespace"), ("decoder", "WordPiece")):
        assert kind not in READ[part]
        path.write_text(json.dumps(table | {part: {"type": kind, "prefix": "##", "cleanup": False}}), encoding="utf-8")
        with pytest.raises(RuntimeError, match="Failed to load"):
            reader(made)
        with pytest.raises(TargetError, match=f"TextLLMRunner does not know '{kind}' as {part}"):
            check_tokenizer(made)
    path.write_text(json.dumps(table), encoding="utf-8")
    check_tokenizer(made)


def pop(table: dict[str, Any]) -> None:
    table["added_tokens"].pop(3)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("tokenizer.json", lambda t: t.update(post_processor=None), "begins a text with \\[\\] instead of \\[1\\]"),
        ("tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "cuts text"),
        ("tokenizer.json", pop, "other marks"),
        ("tokenizer.json", lambda t: t["model"]["merges"].reverse(), "another order"),
        ("tokenizer.json", lambda t: t["decoder"]["decoders"].append({"type": "Strip"}), "writes text"),
        ("tokenizer.json", lambda t: t.pop("model"), "cannot be followed"),
        ("tokenizer_config.json", lambda t: t.update(bos_token="</s>"), "bos_token"),
        ("tokenizer_config.json", lambda t: t.update(tokenizer_class="LlamaTokenizer"), "tokenizer_class"),
    ],
)
def test_damages_are_told(name: str, change: Callable[[dict[str, Any]], Any], told: str, made: Path) -> None:
    artifact = cast(Artifact, SimpleNamespace(folder=made, context=64, paths=lambda role: [made / name]))
    quantized = cast(QuantizedCheckpoint, SimpleNamespace(folder=demo_checkpoint()))
    assert list(faults(artifact, quantized)) == []
    table = json.loads((made / name).read_text(encoding="utf-8"))
    change(table)
    (made / name).write_text(json.dumps(table), encoding="utf-8")
    assert any(re.search(told, fault) for fault in faults(artifact, quantized))
