"""The tokenizer that genai reads: the checkpoint's tokens in genai itself, and each damage of its files is told."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from bluelm.checkpoint import Checkpoint
from bluelm.errors import TargetError
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Message, Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from eval import heldout
from eval.files.structure import ODD
from export.artifacts.artifact import Artifact
from export.onnx import genai as onnx_genai
from export.readback import read_back
from export.tokenizer.genai import LONGEST, check_tokenizer, write_tokenizer
from targets.registry import find
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import train_tokenizer
from tests.support.damage import again

HARD = (
    *ODD, "x   y", "  two spaces\n\ttab", "你好，“世界”。……——", "[|Human|]:你好[|AI|]:", "a[|AI|]:b", "<0x41><unk>",
    "é\u0301 \u00a0nb\u3000wide", "人花山春" * 200, "word " * 400, f"https://{'a-long/address.of/' * 20}",
    " " * 200 + "x", "literal ▁▁marks▁", "\n \n\n x" * 40,
)  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("genai") / "quantized", blocks=1)


@pytest.fixture(scope="module")
def artifact(quantized: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return onnx_genai.export(quantized, tmp_path_factory.mktemp("genai") / "artifact", context=64, chunk=16)


def genai(folder: Path) -> Any:
    module: Any = importlib.import_module("onnxruntime_genai")  # has no annotations
    return module.Tokenizer(module.Model(str(folder)))


def test_genai_and_hugging_faces_library_read_the_checkpoints_tokens(artifact: Artifact) -> None:
    ours, theirs = Tokenizer.from_folder(artifact.folder), genai(artifact.folder)
    library = tokenizers.Tokenizer.from_file(str(artifact.folder / "tokenizer.json"))
    assert ours.source.name == "tokenizer.model"
    texts = [*HARD, *heldout.load((), ours, length=64).texts]
    for text in texts:
        wanted = ours.encode(text, marks=True)
        assert library.encode(text, add_special_tokens=False).ids == wanted, text
        assert [int(token) for token in theirs.encode(text)] == wanted, text
        assert theirs.decode(wanted) == ours.decode(wanted) or "�" in ours.decode(wanted), text
    assert [int(token) for token in theirs.encode("[|Human|]:你好[|AI|]:")] == [4, 2317, 2306, 5]
    assert len(texts) > 400


@pytest.mark.parametrize("text", ["ab" * 20_000, "😀的" * 8_000, " " * 40_000, "▁" * 20_000, "\n" * 40_000])
def test_runs_over_genais_limit_are_cut_between_characters(artifact: Artifact, text: str) -> None:
    """Without bounds on what is repeated its pattern takes so much stack that the process dies."""
    ours, theirs = Tokenizer.from_folder(artifact.folder), genai(artifact.folder)
    found = [int(token) for token in theirs.encode(text)]
    assert ours.decode(found).replace("▁", " ") == text.replace("▁", " ")
    short = text[: LONGEST // 4]
    assert [int(token) for token in theirs.encode(short)] == ours.encode(short)


def test_genai_puts_chats_as_the_checkpoint_does(artifact: Artifact, quantized: QuantizedCheckpoint) -> None:
    """In the template that it was given, which is still BlueLM's to everybody else."""
    ours, theirs = quantized.tokenizer(), genai(artifact.folder)
    again = Tokenizer.from_folder(artifact.folder)
    assert ours.template and again.template and again.template.sources == ours.template.sources
    for chat in (
        [("user", "你好")],
        [("system", "Be brief."), ("user", "1\n2")],
        [("user", "a  b"), ("assistant", "It is 42."), ("user", "谢谢！")],
        [("user", "x"), ("assistant", "y")],
    ):
        messages = [{"role": role, "content": content} for role, content in chat]
        prompt = theirs.apply_chat_template(json.dumps(messages), add_generation_prompt=chat[-1][0] == "user")
        wanted = ours.chat([Message(**message) for message in messages])
        assert [int(token) for token in theirs.encode(prompt)] == wanted


def test_pieces_with_a_space_of_their_own(tmp_path: Path) -> None:
    """A dummy prefix, as of Llama's pieces; Hugging Face's library is the judge."""
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(add_dummy_prefix=True))
    made = tmp_path / "made"
    made.mkdir()
    assert set(write_tokenizer(made, tmp_path, 64)) == {"tokenizer.json", "tokenizer_config.json"}
    library = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("the model", "a\nb", "你好 the"):
        assert library.encode(text, add_special_tokens=False).ids == ours.encode(text), text
        assert library.decode(ours.encode(text)) == text


def test_pieces_that_are_no_bpe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(model_type="unigram"))
    with pytest.raises(TargetError, match="no SentencePiece model but BPE"):
        check_tokenizer(tmp_path)
    with pytest.raises(TargetError, match="no SentencePiece model but BPE"):  # before any work
        find("generic-arm64", runtime="onnx-genai").check_tokenizer(tmp_path, Checkpoint.open(demo_checkpoint()).config)


def table(change: Callable[[dict[str, Any]], Any]) -> tuple[str, Callable[[dict[str, Any]], Any]]:
    return "tokenizer.json", change


def settings(**values: Any) -> tuple[str, Callable[[dict[str, Any]], Any]]:
    return "tokenizer_config.json", lambda found: found.update(values)


def swap(found: dict[str, Any]) -> None:
    pairs = found["model"]["merges"]
    pairs[0], pairs[-1] = pairs[-1], pairs[0]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (table(swap), "another order"),
        (table(lambda t: t["model"]["merges"].pop()), "other merges"),
        (table(lambda t: t["model"]["vocab"].update({"e": 9, "▁t": 8})), "other pieces"),
        (table(lambda t: t["added_tokens"].pop(4)), "other marks"),
        (table(lambda t: t["added_tokens"][0].update(special=False)), "<s>"),
        (table(lambda t: t["added_tokens"].append({**t["added_tokens"][-1], "id": 2030, "content": "e"})), "a mark"),
        (table(lambda t: t["added_tokens"][5].update(lstrip=True)), "more than its text"),
        (table(lambda t: t["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": "▁"})), "spaces"),
        (table(lambda t: t.update(pre_tokenizer={"type": "Whitespace"})), "followed|cuts text"),
        (table(lambda t: t["decoder"]["decoders"].pop()), "writes text"),
        (table(lambda t: t["model"].update(byte_fallback=False)), "byte_fallback"),
        (table(lambda t: t.update(post_processor={"type": "Bert"})), "post_processor"),
        (table(lambda t: t.pop("model")), "cannot be followed"),
        (settings(eos_token="<pad>"), "eos_token"),
        (settings(tokenizer_class="BlueLMTokenizer"), "class"),
        (settings(chat_template="{{ messages }}"), "chat_template"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_damage_is_told(
    artifact: Artifact, quantized: QuantizedCheckpoint, tmp_path: Path,
    damage: tuple[str, Callable[[dict[str, Any]], Any]], told: str,
) -> None:  # fmt: skip
    name, change = damage
    hurt = Artifact.open(Path(shutil.copytree(artifact.folder, tmp_path / "hurt")))
    path = hurt.folder / name
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")
    wrong = read_back(again(hurt), quantized).wrong
    assert any(re.search(told, fault.told) for fault in wrong), wrong
