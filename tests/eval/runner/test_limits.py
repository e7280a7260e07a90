"""What a program misreads by a limit of its own is taken out of a text, and nothing else; genai itself is the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from eval.budget.limits import STRUCTURE
from eval.runner import held, limits
from eval.runner.held import Expected
from export.onnx import genai
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXT = "def f():\n    \n    \n    return 1\n\nx </s>"
ROWS = 320


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """A tiny Qwen2 that cuts text as the real ones do; `</s>` is a piece like any other."""
    place = tmp_path_factory.mktemp("qwen")
    source = write_checkpoint(
        place / "float", architecture="Qwen2ForCausalLM", vocab=ROWS, layers=1, layer_norm=False, tokenizer=False,
        eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=ROWS, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(["a\n    \n    b\n\n", "</s> </s>"] * 40, trainer)
    made.save(str(source / "tokenizer.json"))
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    return rounded(place / "quantized", source=source)


def test_what_is_taken_out(quantized: QuantizedCheckpoint, tmp_path: Path) -> None:
    tokenizer = quantized.tokenizer()
    assert limits.for_genai(TEXT, tokenizer) == "def f():\n\n\n    return 1\n\nx </s>"
    assert limits.for_genai("a\n\n  b \n", tokenizer) == "a\n\n  b \n"
    from bluelm.system.files import demo_checkpoint

    demo = Tokenizer.from_folder(demo_checkpoint())
    assert limits.for_genai(TEXT, demo) == limits.for_llama_cpp(TEXT, demo) == TEXT


def test_only_what_it_misreads_is_let_pass(
    quantized: QuantizedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = genai.export(quantized, tmp_path / "a", context=64)
    expected = Expected(quantized.config, quantized.tokenizer(), [TEXT], [[5, 6, 7]], None)
    found = {figure.name: figure.value for figure in held.figures(artifact, expected, "cpu")}
    assert found["runner_token_mismatches"] == 0 and found["runner_refusals"] == 0
    monkeypatch.setattr(limits, "for_genai", lambda text, tokenizer: text)
    found = {figure.name: figure.value for figure in held.figures(artifact, expected, "cpu")}
    assert found["runner_token_mismatches"] == 2 > STRUCTURE["runner_token_mismatches"][0]  # the very long text, too
