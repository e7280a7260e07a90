"""How a text begins and ends: the checkpoint's own words, held against transformers; which tokenizer file counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from calibration.samples import load_samples
from calibration.sources import Document
from compress.engine import quantize
from compress.formats.plain import write_tokenizer as write_plain
from compress.recipe import Recipe
from eval.heldout import pack
from export.bundle.project import runtimes
from pipeline.bundles.chats import check_app
from tests.support.checkpoints.shapes import train_tokenizer, write_checkpoint
from tests.support.files.tokenizers import write_tokenizer

TEXT = "A phone's 12345 models"


def settings(folder: Path, name: str = "tokenizer_config.json", **values: Any) -> Path:
    """Add fields to one of the folder's JSON files."""
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))
    return folder


@pytest.mark.parametrize("more", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"bos_token": None}])
@pytest.mark.parametrize(("kind", "begins"), [("qwen2", False), ("llama-bpe", True)])
def test_tokenizer_json_begins_a_text_as_its_post_processor_says(
    kind: str, begins: bool, more: dict[str, Any], tmp_path: Path
) -> None:
    """A Qwen2 whose config.json names a bos, and a Llama-3; add_bos_token changes neither, there or here."""
    write_tokenizer(tmp_path, kind)
    settings(tmp_path, "config.json", model_type="qwen2" if kind == "qwen2" else "llama", bos_token_id=321)
    settings(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **more)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode(TEXT, bos=True) == transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert bool(ours.front) == begins


@pytest.mark.parametrize(
    "more",
    [{"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": None}, {"add_bos_token": True,
     "bos_token": "</s>"}, {"add_bos_token": False, "eos_token": "[|AI|]:"}],
)  # fmt: skip
def test_tokenizer_model_begins_a_text_as_add_bos_token_says(more: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    settings(tmp_path, "config.json", model_type="llama", bos_token_id=1, eos_token_id=2)
    settings(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **more)
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode(TEXT, bos=True) == theirs(TEXT)["input_ids"]
    assert ours.bos == theirs.bos_token_id
    assert ours.eos == theirs.eos_token_id


def test_where_nothing_is_said_the_class_of_bluelm_begins_with_bos(tmp_path: Path) -> None:
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    assert Tokenizer.from_folder(tmp_path).front == (1,)
    assert Tokenizer.from_folder(settings(tmp_path, bos_token=None)).front == ()


def test_chatglm_begins_with_its_two_marks(tmp_path: Path) -> None:
    """tokenization_chatglm.py, build_inputs_with_special_tokens: [gMASK] sop in front of every text."""
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    ours = Tokenizer.from_folder(settings(tmp_path, "config.json", model_type="chatglm"))
    assert ours.front == (6145, 6147)
    assert [ours.pieces.id(mark) for mark in ("[gMASK]", "sop")] == [6145, 6147]


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe"])
def test_calibration_and_judging_begin_windows_so_too(kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind)
    settings(tmp_path, "config.json", bos_token_id=321)
    ours = Tokenizer.from_folder(tmp_path)
    tokens = load_samples(None, ours, 3, 32, 0).tokens
    windows = pack([Document(text=TEXT)] * 20, "a", ours, 32)
    begins = [321] if kind == "llama-bpe" else []
    assert list(ours.front) == begins
    assert (tokens == 321).sum() >= 3 * len(begins) and ((tokens == 321).any() == bool(begins))
    plain = ours.encode(TEXT)
    window = windows[0].tokens.tolist()
    assert window[: len(begins) + len(plain)] == begins + plain
    assert windows[0].judged.tolist()[:2] == [False, True], "nothing announces the first token"


@pytest.mark.parametrize("more", [["newer"], []])
def test_tokenizer_json_beside_an_older_tokenizer_model(more: list[str], tmp_path: Path) -> None:
    """transformers takes tokenizer.json; where both have the same tokens tokenizer.model is read, as runners do."""
    model = demo_checkpoint() / "tokenizer.model"
    shutil.copy(model, tmp_path)
    settings(tmp_path, "config.json", model_type="llama")
    converted = transformers.AutoTokenizer.from_pretrained(
        settings(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    )
    converted.add_tokens(more)
    converted.save_pretrained(tmp_path / "both")
    shutil.copy(model, tmp_path / "both")
    settings(tmp_path / "both", added_tokens_decoder={})
    ours = Tokenizer.from_folder(tmp_path / "both")
    assert ours.source.name == ("tokenizer.json" if more else "tokenizer.model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "both")
    assert ours.encode(f"{TEXT} newer") == theirs(f"{TEXT} newer", add_special_tokens=False)["input_ids"]
    slow = settings(tmp_path / "both", auto_map={"AutoTokenizer": ["tokenization_x.XTokenizer", None]})
    assert Tokenizer.from_folder(slow).source.name == "tokenizer.model"


def test_a_tokenizer_model_of_another_library_gives_way_to_tokenizer_json(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama-bpe")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's, as Llama-3 has it
    assert Tokenizer.from_folder(tmp_path).source.name == "tokenizer.json"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="not a SentencePiece model"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("told", [{"eos_token_id": [2, 7]}, {"eos_token_id": 7, "bos_token_id": 5}, None])
def test_end_tokens_are_those_of_transformers_generate(told: dict[str, Any] | None, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if told is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(told))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = model._prepare_generation_config(None)[0].eos_token_id
    ours = ModelConfig.from_folder(tmp_path)
    assert list(ours.eos_token_ids) == (theirs if isinstance(theirs, list) else [theirs])
    (tmp_path / "generation_config.json").write_text("{}")  # with this transformers never ends
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2,)
    before = Checkpoint.open(tmp_path).digest()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    assert Checkpoint.open(tmp_path).digest() != before, "a run that is resumed would keep the old ones"


def test_end_tokens_go_into_the_quantized_checkpoint_and_other_folders(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "float")
    settings(tmp_path / "float", "generation_config.json", eos_token_id=[2, 7])
    codes = quantize(Checkpoint.open(tmp_path / "float"), None, Recipe.make({"method": "rtn"}), tmp_path / "codes")
    assert codes.config.eos_token_ids == (2, 7)
    (tmp_path / "out").mkdir()
    write_plain(codes.folder, tmp_path / "out", codes.config)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [("config.json", "eos_token_id", 512), ("config.json", "bos_token_id", 600),
     ("generation_config.json", "eos_token_id", [2, 512])],
)  # fmt: skip
def test_tokens_beyond_the_vocabulary_are_refused(file: str, field: str, value: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    settings(tmp_path, file, **{field: value})
    with pytest.raises(InputError, match=f"{field} is .* 512 rows") as caught:
        Checkpoint.open(tmp_path)
    assert file in str(caught.value)


def test_a_pad_token_beyond_the_vocabulary_pads_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert Checkpoint.open(settings(tmp_path, "config.json", pad_token_id=512)).config.pad_token_id is None


def test_a_bad_generation_config_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vocab=512, tokenizer=False)
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(vocab_size=400))
    settings(tmp_path, "generation_config.json", eos_token_id="</s>")
    with pytest.raises(InputError, match="eos_token_id must be a whole number") as caught:
        Checkpoint.open(tmp_path)
    assert "generation_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("model", {}, None),
        ("model", {"add_bos_token": False}, "chats have another"),
        ("llama-bpe", {}, "reads tokenizer.model"),
    ],
)
def test_the_swift_app_is_refused_where_it_would_begin_chats_otherwise(
    kind: str, more: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    if kind == "model":
        shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    else:
        write_tokenizer(tmp_path, kind)
    settings(tmp_path, "config.json", model_type="BlueLM")
    tokenizer = Tokenizer.from_folder(settings(tmp_path, **more))
    check_app(tokenizer, runtimes()["onnxruntime"], "gradle")  # the Kotlin app's own tokenizer reads each
    if why is None:
        check_app(tokenizer, runtimes()["coreml"], "xcode")
        return
    with pytest.raises(TargetError, match=why):
        check_app(tokenizer, runtimes()["coreml"], "xcode")
