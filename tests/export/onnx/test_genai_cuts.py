"""A byte-level tokenizer.json as genai heeds it: the same tokens there, and in Hugging Face's library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from bluelm.errors import TargetError
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from eval import heldout
from eval.runner.texts import HARD
from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from export.onnx import genai
from export.readback import read_back
from export.tokenizer.genai_cuts import respelled
from targets.runners.genai import open_genai
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.damage import again

RUNNER = StandardRunner("onnxruntime-genai", "", "onnxruntime-genai")
ROWS = 320


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """A tiny Llama with the kind of tokenizer that SmolLM2 has."""
    place = tmp_path_factory.mktemp("cuts")
    source = write_checkpoint(place / "float", architecture="LlamaForCausalLM", vocab=ROWS, layers=1, tokenizer=False)
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=ROWS, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the sea and the sky\n\n", "def f(x):\n    return x\n\n", "你好，世界"] * 40, trainer)
    made.save(str(source / "tokenizer.json"))
    named = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    return rounded(place / "quantized", source=source)


@pytest.fixture(scope="module")
def artifact(quantized: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return genai.export(quantized, tmp_path_factory.mktemp("cuts") / "a", context=64)


def test_genai_reads_the_checkpoints_tokens(artifact: Artifact, quantized: QuantizedCheckpoint) -> None:
    ours, again = quantized.tokenizer(), Tokenizer.from_folder(artifact.folder)
    texts = [*HARD, "\n\n1. one\n\n2.  two", *heldout.load((), ours, length=64).texts[::6]]
    wanted = [ours.encode(text, marks=True) for text in texts]
    assert [again.encode(text, marks=True) for text in texts] == wanted
    with open_genai(artifact, RUNNER) as runner:
        assert runner.tokens(texts) == wanted
    assert not [fault for fault in read_back(artifact, quantized).wrong if "tokenizer" in fault.told]


@pytest.mark.parametrize(
    ("change", "told"),
    [({"pre_tokenizer": None}, "cuts text otherwise"), ({"added_tokens": []}, "another added_tokens")],
)
def test_damage_is_told(
    change: dict[str, Any], told: str, artifact: Artifact, quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    hurt = Artifact.open(Path(shutil.copytree(artifact.folder, tmp_path / "hurt")))
    path = hurt.folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert any(told in fault.told for fault in read_back(again(hurt), quantized).wrong)


def test_what_genai_has_no_words_for_is_refused() -> None:
    parts = [{"type": "Punctuation", "behavior": "Isolated"}, {"type": "ByteLevel", "use_regex": False}]
    with pytest.raises(TargetError, match="cuts no text as the tokenizer's Punctuation does"):
        respelled({"type": "Sequence", "pretokenizers": parts})
    assert respelled(None) is None and respelled({"type": "ByteLevel", "use_regex": True}) is None


@pytest.mark.parametrize("named", [None, "CohereTokenizerFast"])
def test_a_class_that_genai_does_not_know_is_one_that_it_knows(
    named: str | None, quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    shutil.copytree(quantized.folder, tmp_path / "q")
    path = tmp_path / "q" / "tokenizer_config.json"
    theirs = {**json.loads(path.read_text()), "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    del theirs["tokenizer_class"]
    path.write_text(json.dumps(theirs | ({} if named is None else {"tokenizer_class": named})))
    other = QuantizedCheckpoint.open(tmp_path / "q")
    made = genai.export(other, tmp_path / "a", context=64)
    with open_genai(made, RUNNER) as runner:
        assert runner.chat([{"role": "user", "content": "the sea"}]).text == "<s>the sea"
    assert not read_back(made, other).wrong
    settings = made.folder / "tokenizer_config.json"
    for hurt in ({"tokenizer_class": "GPT2Tokenizer"}, {"chat_template": "{{ messages[0].content }}"}):
        written = settings.read_text()
        settings.write_text(json.dumps(json.loads(written) | hurt))
        assert any("tokenizer_config.json" in str(fault) for fault in read_back(made, other).wrong)
        settings.write_text(written)
