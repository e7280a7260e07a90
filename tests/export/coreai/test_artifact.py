"""Core AI's folders: Apple's own package reads our numbers from them, and its runtime answers as the dequantized
model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bluelm.errors import InputError, TargetError
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.coreai.export import export
from export.readback import ends, items, read_back
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from tests.support.checkpoints.families import llama, qwen2, qwen3
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.damages import copied, files, metadata, runners
from tests.support.edits import coreai

pytestmark = pytest.mark.linux
CONTEXT = 192
ABOUT = {"name": "A demo", "license": "apache-2.0", "version": "3"}
ASSET = "model/model.aimodel"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    others = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1}}
    return rounded(tmp_path_factory.mktemp("coreai") / "quantized", blocks=1, layers=others)


@pytest.fixture(scope="module")
def artifact(quantized: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(quantized, tmp_path_factory.mktemp("coreai") / "a", context=CONTEXT, about=ABOUT)


def test_apples_package_reads_our_numbers(quantized: QuantizedCheckpoint, artifact: Artifact) -> None:
    from export.coreai.reader import read_program

    main = read_program(artifact.folder / ASSET).graphs["main"]
    product = main.outputs["logits"]
    codes, scales = product.inputs[1].inputs[0].inputs[:2]
    assert codes.array is not None and scales.array is not None
    head = quantized.linear("lm_head")
    assert codes.kind == "si8" and np.array_equal(codes.array(), head.signed_codes().numpy())
    assert np.array_equal(scales.array(), head.scales.numpy())
    assert read_back(artifact, quantized).sentences == [] and not read_back(artifact, quantized).wrong


def test_what_it_says_is_what_apples_program_asks(artifact: Artifact) -> None:
    """Keys of `ModelBundle.swift` and `LanguageConfig.swift`."""
    told = json.loads((artifact.folder / "model" / "metadata.json").read_text())
    assert (told["metadata_version"], told["kind"], told["name"]) == ("0.2", "llm", "A demo")
    assert told["assets"] == {"main": "model.aimodel"} and told["user_data"] == {
        "license": "apache-2.0",
        "version": "3",
    }
    language = told["language"]
    assert (language["vocab_size"], language["max_context_length"]) == (6144, CONTEXT)
    assert language["embedded_tokenizer"] is True and language["function_map"] == {"main": ["main"]}
    asset = json.loads((artifact.folder / ASSET / "metadata.json").read_text())
    assert (asset["description"], asset["license"]) == ("A demo", "apache-2.0")
    assert ends.coreai(artifact, {2}) is None and ends.coreai(artifact, {2, 3}) is not None


def test_apples_runtime_answers_as_the_dequantized_model(quantized: QuantizedCheckpoint, artifact: Artifact) -> None:
    tokens = np.random.default_rng(0).integers(10, 6000, 150).tolist()  # more than are given at once
    wanted = TorchRuntime(quantized, CONTEXT).logits(tokens)
    with open_runtime(artifact.folder) as runtime:
        found = runtime.logits(tokens)
        assert np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()
        runtime.rewind(145)
        again = np.stack([runtime.decode(token) for token in tokens[145:]])
        assert np.abs(again - found[145:]).max() < 2e-3 * np.abs(wanted).max()
        with pytest.raises(InputError, match=f"do not fit a context of {CONTEXT}"):
            runtime.prefill([5] * 43)
        stream = runtime.blocks(tokens[:4])  # pyright: ignore[reportAttributeAccessIssue]
    assert stream.shape == (2, 4, 256)
    assert np.abs(stream[0] - quantized.embedding()[tokens[:4]].numpy()).max() < 1e-3


@pytest.mark.parametrize("family", [llama, qwen2, qwen3], ids=lambda make: make.__name__)
def test_other_families_answer_too(family: object, tmp_path: Path) -> None:
    held = rounded(tmp_path / "quantized", source=family(tmp_path / "float"))  # pyright: ignore
    made = export(held, tmp_path / "a", context=64)
    assert not read_back(made, held).wrong
    tokens = list(range(5, 45))
    wanted = TorchRuntime(held, 64).logits(tokens)
    with open_runtime(made.folder) as runtime:
        found = np.concatenate([runtime.logits(tokens[:-2]), [runtime.decode(token) for token in tokens[-2:]]])
    assert np.abs(found - wanted).max() < 5e-3 * np.abs(wanted).max()


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "float", vocab=4096, layers=1, tokenizer=False, tied=True, layer_norm=False,
                              architecture="LlamaForCausalLM")  # fmt: skip
    held = rounded(tmp_path / "quantized", source=source)
    made = export(held, tmp_path / "a", context=16)
    assert made.path("model").stat().st_size < 1.5 * held.embed().codes.numel() and not read_back(made, held).wrong


def test_the_same_checkpoint_gives_the_same_bytes(
    quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    """In another process, where names that are made of addresses would be others."""
    code = (
        "import sys; from pathlib import Path; from compress.checkpoint.store import QuantizedCheckpoint as Q; "
        "from export.coreai.export import export; "
        f"export(Q.open(Path(sys.argv[1])), Path(sys.argv[2]), context={CONTEXT}, about={ABOUT!r})"
    )
    subprocess.run([sys.executable, "-c", code, str(quantized.folder), str(tmp_path / "a")], check=True)
    assert Artifact.open(tmp_path / "a").files == artifact.files


DAMAGES = [row for row in (*metadata.ROWS, *runners.ROWS, *files.ROWS) if row.formats[0] == "coreai"]
DAMAGES = [row for row in DAMAGES if row.name != "coreai: one end token of two"]  # there is one


@pytest.mark.parametrize("row", DAMAGES, ids=lambda row: row.name)
def test_what_was_changed_is_named(
    row: metadata.Damage, quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    assert row.files is not None
    hurt = row.files(copied(artifact, tmp_path / "a"))
    assert read_back(hurt, quantized).wrong


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("model.layers.0.self_attn.q_proj.codes", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.mlp.down_proj.scales", "model.layers.0.mlp.down_proj"),
        ("model.embed_tokens.codes", EMBED),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.weight"),
        ("rope.sin", items.ROPE),
    ],
)
def test_a_changed_number_is_named(
    name: str, item: str, quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    hurt = copied(artifact, tmp_path / "a")
    coreai.rewritten(hurt.folder / ASSET, coreai.number(name, 301, 0x10))
    assert {finding.item for finding in read_back(hurt, quantized).wrong} == {item}


def test_a_damaged_file_is_an_error(quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path) -> None:
    hurt = copied(artifact, tmp_path / "a")
    path = hurt.folder / ASSET / "main.mlirb"
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    with pytest.raises(InputError, match=r"main\.hash is of another program"):
        read_back(hurt, quantized)
    with pytest.raises(TargetError, match=r"Core AI refuses the program|died"):
        open_runtime(hurt.folder).close()


def test_weights_that_it_cannot_hold_are_refused(quantized: QuantizedCheckpoint, tmp_path: Path) -> None:
    held = rounded(tmp_path / "quantized", blocks=1, symmetric=False)
    with pytest.raises(TargetError, match="no zero points"):
        export(held, tmp_path / "a")
    assert torch.float16 == quantized.linear("lm_head").scales.dtype
