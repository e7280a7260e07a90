"""Byte-level BPE in a GGUF file: a tokenizer of the file's lists answers as tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bluelm.errors import InputError, TargetError
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.gguf import export as gguf_file
from export.gguf.bpe import read_byte_pairs
from export.gguf.reader import GgufWeights
from export.readback import differing
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from tests.support.checkpoints.rounded import rounded
from tests.support.files.tokenizers import EXPRESSIONS, ROWS, write_tokenizer

TEXTS = ["A phone's 12345 models,\n\n  don't WE'LL run  ", "你好 🦄 <|end|>", "\tx = 3.14159;\r\n", "naïve café"]


@pytest.fixture(scope="module", params=list(EXPRESSIONS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, QuantizedCheckpoint]:
    import transformers

    name = {"qwen2": "Qwen2", "llama-bpe": "Llama"}[request.param]
    folder = tmp_path_factory.mktemp("bpe")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=320,
    )  # fmt: skip
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder / "float")
    write_tokenizer(folder / "float", request.param)
    table = folder / "float" / "tokenizer.json"
    saved = json.loads(table.read_text())  # what whoever trained it had asked for: no rule of the model
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }  # fmt: skip
    table.write_text(json.dumps(saved))
    return request.param, rounded(folder / "quantized", source=folder / "float")


def test_the_file_holds_the_tokenizer(model: tuple[str, QuantizedCheckpoint], tmp_path: Path) -> None:
    kind, source = model
    made = gguf_file.export(source, tmp_path / "a", context=64)
    ours = Tokenizer.from_folder(source.folder)
    fields = GgufWeights(made.path("model"), source.config).fields
    found = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}
    assert (found["model"], found["pre"]) == ("gpt2", kind)
    assert len(found["tokens"]) == len(found["token_type"]) == ROWS == len(set(found["tokens"]))
    assert found["tokens"][320:324] == ["<|end|>", "<|begin|>", "plain-added", "[unused 323]"]
    assert found["token_type"][319:324] == [1, 3, 3, 4, 5]  # normal, control, control, user defined, unused
    assert found["eos_token_id"] == 320 and found["add_bos_token"] is (kind == "llama-bpe")
    assert found.get("bos_token_id") == ours.bos
    assert len(ours.encode("12345")) == (5 if kind == "qwen2" else 2)
    for text in TEXTS:
        assert rebuilt(found, kind).encode(text).ids == ours.encode(text, marks=True), text
    assert differing(made, source) == []
    with open_runtime(made.folder) as runtime:
        tokens = ours.encode("a model", bos=True)
        assert np.array_equal(runtime.logits(tokens), TorchRuntime(source, 64).logits(tokens))


def rebuilt(found: dict[str, Any], kind: str) -> Any:
    """A tokenizer of nothing but the file's lists, cut as llama.cpp cuts for the file's `pre`."""
    from tokenizers import AddedToken, Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Json

    tokens, kinds = found["tokens"], found["token_type"]
    merges = [tuple(pair.split(" ")) for pair in found["merges"]]
    made: Any = Json(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    cut = pre_tokenizers.Split(Regex(EXPRESSIONS[kind]), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([
        cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    for number, special in ((3, True), (4, False)):
        texts = [token for token, kind in zip(tokens, kinds, strict=True) if kind == number]
        made.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts])
    return made


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no pre-tokenizer that splits text like this one"),
        ({"pre_tokenizer": None}, "no pre-tokenizer that splits text like this one"),
        ({"model": {"type": "Unigram", "vocab": []}}, "only SentencePiece and byte-level BPE tokenizers"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    write_tokenizer(tmp_path, "qwen2")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TargetError, match=problem):
        read_byte_pairs(path, ROWS)


def test_gpt2s_own_cut_and_fewer_rows_than_tokens(tmp_path: Path, model: tuple[str, QuantizedCheckpoint]) -> None:
    write_tokenizer(tmp_path, "qwen2")
    path = tmp_path / "tokenizer.json"
    own = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "pre_tokenizer": own}))
    assert read_byte_pairs(path, ROWS).cut == "gpt-2"
    import gguf

    from export.gguf.tokenizer import add_tokenizer

    config = model[1].config.from_dict({**model[1].config.to_dict(), "vocab_size": 300})
    with pytest.raises(InputError, match="323 tokens, the embedding 300 rows"):
        add_tokenizer(gguf.GGUFWriter(None, "qwen2"), tmp_path, config)
