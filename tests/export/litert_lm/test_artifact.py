"""A .litertlm: repeatable, read by LiteRT-LM's own tools, exact weights, logits against dequantized torch, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litert_lm_builder
import numpy as np
import pytest
import torch
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from bluelm.errors import InputError, TargetError
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.litert.reader import read
from export.litert_lm.export import check_tokenizer, export
from export.litert_lm.judged import write_judged
from export.litert_lm.reader import LitertLmFile
from export.readback import read_back
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from tests.support.answers import TEXT, mean_kl
from tests.support.checkpoints.rounded import linear_names, rounded
from tests.support.checkpoints.shapes import train_tokenizer, write_checkpoint
from tests.support.damages import copied
from tests.support.damages.runners import SEEN
from tests.support.edits.litert import byte, number
from tests.support.edits.litert_lm import graph, repacked, told
from tests.support.files.tokenizers import write_tokenizer

CONTEXT, CHUNK = 64, 16
ABOUT = {"name": "A demo", "license": "apache-2.0"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("lm") / "quantized", blocks=1)


@pytest.fixture(scope="module")
def artifact(quantized: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(quantized, tmp_path_factory.mktemp("lm") / "a", context=CONTEXT, chunk=CHUNK, about=ABOUT)


def test_the_same_model_gives_the_same_bytes(
    quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    again = export(quantized, tmp_path / "a", context=CONTEXT, chunk=CHUNK, about=ABOUT)
    assert again.path("model").read_bytes() == artifact.path("model").read_bytes()


def test_its_own_tools_unpack_it(quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path) -> None:
    litert_lm_builder.unpack_litertlm_file(str(artifact.path("model")), str(tmp_path))
    (tables,) = tmp_path.rglob("*.tflite")
    contents = read(tables)
    assert set(contents.linears) == {*linear_names(quantized), "model.embed_tokens"}
    for name, found in contents.linears.items():
        wanted = quantized.linear(name)
        assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales), name
    assert set(contents.signatures) == {f"prefill_{CHUNK}", "decode"}
    metadata: Any = llm_metadata_pb2
    told = metadata.LlmMetadata.FromString(LitertLmFile(artifact.path("model")).metadata().SerializeToString())
    assert (list(told.start_token.token_ids.ids), told.max_num_tokens) == ([1], CONTEXT)
    assert [list(token.token_ids.ids) for token in told.stop_tokens] == [[2]]
    (header,) = tmp_path.rglob("*.toml")
    assert "A demo" in header.read_text() and "apache-2.0" in header.read_text()


def test_logits_agree_with_dequantized_torch_over_chunks_and_single_tokens(
    quantized: QuantizedCheckpoint, artifact: Artifact
) -> None:
    tokens = (TEXT * 4)[:CONTEXT]
    reference = TorchRuntime(quantized, CONTEXT).logits(tokens)
    with open_runtime(artifact.folder) as runtime:
        assert mean_kl(reference, runtime.logits(tokens)) < 5e-3  # 8-bit activations
        runtime.rewind(CONTEXT - 20)  # whose chunk ends behind the context
        last = runtime.prefill(tokens[-20:])
        assert mean_kl(reference[-20:], last) < 5e-3
        runtime.rewind(CONTEXT - 20)
        stepped = np.stack([runtime.decode(token) for token in tokens[-20:]])
        assert mean_kl(last, stepped) < 1e-3
        with pytest.raises(InputError, match="do not fit a context of 64"):
            runtime.prefill([5])


@pytest.mark.parametrize(
    "widths", [{"head_bits": 4, "head_group_size": 32}, {"embed_bits": 4}, {"bits": 8, "group_size": -1}]
)
def test_other_widths_and_a_shared_table_run(widths: dict[str, Any], tmp_path: Path) -> None:
    shape: dict[str, Any] = {"vocab": 384, "layers": 1, "layer_norm": False, "tied": "embed_bits" not in widths}
    source = write_checkpoint(tmp_path / "float", architecture="LlamaForCausalLM", **shape)
    held = rounded(tmp_path / "q", source=source, **({} if "head_bits" in widths and shape["tied"] else widths))
    made = export(held, tmp_path / "a", context=CONTEXT, chunk=CHUNK)
    assert not read_back(made, held).wrong
    tokens = list(range(5, 45))
    with open_runtime(made.folder) as runtime:
        assert mean_kl(TorchRuntime(held, CONTEXT).logits(tokens), runtime.logits(tokens)) < 5e-3


RUNNERS = {name: change for name, (kind, _, change) in SEEN.items() if kind == "litert-lm"}
FILES: dict[str, tuple[Callable[[Artifact], Artifact], str]] = {
    "a code": (graph(byte("model.layers.0.mlp.up_proj", 70, 0x10)), "model.layers.0.mlp.up_proj"),
    "a code of the table": (graph(byte("model.embed_tokens", 700, 1)), "model.embed_tokens"),
    "a norm": (graph(number("model.norm", 3, lambda x: -x)), "model.norm.weight"),
    "a kind of model": (told(lambda one: one.llm_model_type.qwen3.SetInParent()), "metadata"),
    "a token that is never said": (told(lambda one: one.suppress_tokens.ids.append(7)), "metadata"),
}


@pytest.mark.parametrize("name", [*FILES, *RUNNERS])
def test_what_was_changed_in_the_file_is_named(
    name: str, quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    change, item = FILES.get(name) or (RUNNERS[name], "")
    hurt = change(copied(artifact, tmp_path / "a"))
    wrong = {finding.item for finding in read_back(hurt, quantized).wrong}
    assert wrong and (not item or item in wrong)


def test_a_changed_header_is_named(quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path) -> None:
    assert not read_back(artifact, quantized).wrong
    hurt = copied(artifact, tmp_path / "a")
    repacked(hurt.path("model"), lambda held: None, name="Another")
    assert any("name 'Another'" in finding.told for finding in read_back(hurt, quantized).wrong)
    repacked(hurt.path("model"), lambda held: held.update({"more": held["LlmMetadataProto"]}))
    with pytest.raises(InputError, match="2 sections of the kind LlmMetadataProto"):
        read_back(hurt, quantized)


def test_a_damaged_file_is_bad_input(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "model.litertlm"
    whole = artifact.path("model").read_bytes()
    far = whole[:24] + (1 << 40).to_bytes(8, "little") + whole[32:]
    for data in (
        b"",
        b"LITERTLM",
        whole[:40],
        whole[:20_000],
        far,
        b"x" + whole[1:],
        whole[:32] + bytes(4000) + whole[4032:],
    ):
        path.write_bytes(data)
        with pytest.raises(InputError):
            write_judged(path, tmp_path / "model.tflite", 1)


def test_what_litert_lm_cannot_read_is_refused_before_any_work(tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(TargetError) as error:
            check_tokenizer(Tokenizer.from_folder(folder))
        return str(error.value)

    unigram = tmp_path / "unigram"
    unigram.mkdir()
    (unigram / "tokenizer.model").write_bytes(train_tokenizer(model_type="unigram"))
    (unigram / "config.json").write_text("{}")
    assert "no SentencePiece model but BPE" in refused(unigram)
    silent = tmp_path / "silent"
    silent.mkdir()
    write_tokenizer(silent, "llama-bpe")
    (silent / "config.json").write_text("{}")
    settings = json.loads((silent / "tokenizer_config.json").read_text())
    check_tokenizer(Tokenizer.from_folder(silent))
    for template in ("{{ messages[0].content }}", "<|begin|>{{ messages[0].content }}"):
        (silent / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        assert "begins chats as it does texts" in refused(silent)
