"""Core AI's folder for the Neural Engine: what Apple's engine asks of a program, and what Apple's CPU runtime answers.

No Neural Engine runs here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bluelm.errors import InputError, TargetError
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.coreai.export import export_static
from export.coreai.static import contract
from export.readback import items, read_back
from targets.apple.coreai import CoreaiRuntime
from targets.apple.coreai_messages import Open, Step
from targets.host.child import Child
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from tests.support.checkpoints.families import llama, qwen2, qwen3
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.damages import copied, files, metadata
from tests.support.edits import coreai

pytestmark = pytest.mark.linux
CONTEXT, CHUNK = 192, 32
ASSET = "model/model.aimodel"
DECODE, PREFILL, PROMPT = "extend_192_1", "extend_192_32", "prompt_opt_192_32"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    others = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1}}
    return rounded(tmp_path_factory.mktemp("static") / "quantized", blocks=2, layers=others)


@pytest.fixture(scope="module")
def artifact(quantized: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_static(quantized, tmp_path_factory.mktemp("static") / "a", context=CONTEXT, chunk=CHUNK)


@pytest.fixture(scope="module")
def runtime(artifact: Artifact) -> Iterator[CoreaiRuntime]:
    with open_runtime(artifact.folder) as opened:
        assert isinstance(opened, CoreaiRuntime)
        yield opened


TELLS = """
import asyncio, json, sys
from export.coreai.dialect import authoring
def form(one):
    return [str(one.dtype), *one.shape]
def told(one):
    inputs, states, outputs = one.input_descriptor, one.state_descriptor, one.output_descriptor
    return [{name: form(find(name)) for name in names} for names, find in
            ((one.input_names, inputs), (one.state_names, states), (one.output_names, outputs))]
async def main():
    async with authoring.AIModelAsset.load(sys.argv[1]).executable() as model:
        print(json.dumps({name: told(model.load_function(name).desc) for name in model.function_names}))
asyncio.run(main())
"""


def test_apples_runtime_tells_what_apples_engine_asks_for(artifact: Artifact) -> None:
    """Names, types and shapes of StaticShapeEngine.swift."""
    command = [sys.executable, "-c", TELLS, str(artifact.folder / ASSET)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    gathers = ["gather_embeddings_1", "gather_embeddings_32"]
    assert sorted(found) == sorted(["load_embeddings", *gathers, DECODE, PREFILL, PROMPT])
    table = {"embedding_table": ["int8", 6144, 1, 256]}
    assert found["load_embeddings"] == [{}, {}, table]
    cache = ["float16", 2, 1, 128, 1, CONTEXT]  # the longest axis, which the engine takes for the context
    for name, tokens in ((DECODE, 1), (PREFILL, 32), (PROMPT, 32)):
        inputs, states, outputs = found[name]
        assert inputs == {
            "transformer_input": ["float16", 1, tokens, 1, 256],
            "position_ids": ["uint16", 1, tokens],
            "in_step": ["int32", 1],
            "causal_mask": ["float16", 1, CONTEXT, 1, tokens],
        }
        assert states == {"key_cache": cache, "value_cache": cache}
        assert name == PROMPT or outputs == {"out_logits": ["float16", 1, 1, tokens, 6144]}
    ids = {"in_new_token_ids": ["int32", 1, 32], **table}
    assert found["gather_embeddings_32"] == [ids, {}, {"gathered_embeddings": ["float16", 1, 32, 1, 256]}]


def test_our_numbers_are_in_every_function_and_once_in_the_file(
    quantized: QuantizedCheckpoint, artifact: Artifact
) -> None:
    from export.coreai.reader import read_program

    found = read_back(artifact, quantized)
    assert not found.wrong and found.sentences == []
    graphs = read_program(artifact.folder / ASSET).graphs
    codes = quantized.linear("lm_head").signed_codes().numpy()
    for name in (DECODE, PREFILL):
        held = graphs[name].outputs["out_logits"].inputs[1].inputs[0].inputs[0]
        assert held.array is not None and np.array_equal(held.array(), codes)
    weights = sum(quantized.linear(name).codes.numel() for name in items.linear_names(quantized))
    assert artifact.path("model").stat().st_size < weights + quantized.embed().codes.numel()


def test_apples_runtime_answers_as_the_dequantized_model(
    quantized: QuantizedCheckpoint, runtime: CoreaiRuntime
) -> None:
    tokens = np.random.default_rng(0).integers(10, 6000, 150).tolist()
    wanted = TorchRuntime(quantized, CONTEXT).logits(tokens)
    found = runtime.logits(tokens)
    near = 2e-3 * np.abs(wanted).max()
    assert 0 < np.abs(found - wanted).max() < near
    runtime.rewind(50)  # not where a chunk begins: 18 tokens are computed again
    assert np.abs(runtime.prefill(tokens[50:140]) - found[50:140]).max() < near
    decoded = np.stack([runtime.decode(token) for token in tokens[140:]])
    assert np.abs(decoded - found[140:]).max() < near
    with pytest.raises(InputError, match=f"do not fit a context of {CONTEXT}"):
        runtime.prefill([5] * 43)
    stream = runtime.blocks(tokens[:40])
    assert stream.shape == (3, 40, 256)
    assert np.abs(stream[0] - quantized.embedding()[tokens[:40]].numpy()).max() < 2e-3


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    """Apple's runtime, to be asked step by step."""
    with closing(Child("targets.apple.coreai_worker", tmp_path / "log.txt")) as made:
        yield made


def asked(child: Child, *steps: Step) -> np.ndarray:
    """Logits of the last of some steps."""
    return [child.call(step, 600).logits for step in steps][-1]


def test_prompts_go_through_the_function_that_gives_no_logits(
    quantized: QuantizedCheckpoint, artifact: Artifact, child: Child
) -> None:
    """As the engine calls them: three chunks by `prompt_opt`, the rest by `extend`."""
    tokens = np.random.default_rng(1).integers(10, 6000, 110).tolist()
    wanted = TorchRuntime(quantized, CONTEXT).logits(tokens)
    child.call(Open(str(artifact.folder / ASSET), "main", CONTEXT, 2), 600)
    found = asked(child, Step(tokens, 0, last=True))
    assert found.shape == (110 - 3 * CHUNK, 6144)
    assert np.abs(found - wanted[3 * CHUNK :]).max() < 2e-3 * np.abs(wanted).max()
    with pytest.raises(InputError, match="of 115 tokens before these 110 are known"):
        asked(child, Step([5], 115))
    with pytest.raises(TargetError, match="no function has a context of 128 tokens"):
        child.call(Open(str(artifact.folder / ASSET), "main", 128, 2), 600)


@pytest.mark.parametrize("family", [llama, qwen2, qwen3], ids=lambda make: make.__name__)
def test_other_families_answer_too(family: Any, tmp_path: Path) -> None:
    held = rounded(tmp_path / "quantized", source=family(tmp_path / "float"))
    made = export_static(held, tmp_path / "a", context=64, chunk=16)
    assert not read_back(made, held).wrong
    tokens = list(range(5, 45))
    wanted = TorchRuntime(held, 64).logits(tokens)
    with open_runtime(made.folder) as opened:
        found = np.concatenate([opened.logits(tokens[:-2]), [opened.decode(token) for token in tokens[-2:]]])
    assert np.abs(found - wanted).max() < 8e-3 * np.abs(wanted).max()


@pytest.mark.parametrize(("vocab", "bits"), [(4096, 8), (4099, 8), (4096, 4)])
def test_tables_of_any_length_and_width_are_looked_up_in(vocab: int, bits: int, tmp_path: Path) -> None:
    """Rows are a multiple of eight; a head that is the table is stored once where that needs no more of them."""
    source = write_checkpoint(tmp_path / "float", vocab=vocab, layers=1, tokenizer=False, tied=True, layer_norm=False,
                              architecture="LlamaForCausalLM")  # fmt: skip
    widths = {"embed_bits": bits, "head_bits": bits, "head_group_size": -1}
    held = rounded(tmp_path / "quantized", source=source, **widths)
    made = export_static(held, tmp_path / "a", context=32, chunk=8)
    assert not read_back(made, held).wrong
    table = held.embed().codes.numel() * bits // 8
    assert (made.path("model").stat().st_size < 1.6 * table + 60_000) == (vocab % 8 == 0)
    tokens = [vocab - 1, 0, 7, vocab - 2]
    with open_runtime(made.folder) as opened:
        assert isinstance(opened, CoreaiRuntime)
        assert np.abs(opened.blocks(tokens)[0] - held.embedding()[tokens].numpy()).max() < 1e-3


DAMAGES = [row for row in (*metadata.ROWS, *files.ROWS) if "coreai-ane" in row.formats and len(row.formats) < 3]


@pytest.mark.parametrize("row", DAMAGES, ids=lambda row: row.name)
def test_what_was_changed_is_named(
    row: metadata.Damage, quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    assert row.files is not None
    hurt = row.files(copied(artifact, tmp_path / "a"))
    assert read_back(hurt, quantized).wrong


@pytest.mark.parametrize(
    ("graph", "name", "item"),
    [
        (DECODE, "model.layers.1.self_attn.q_proj.codes", "model.layers.1.self_attn.q_proj"),
        (PREFILL, "model.layers.0.mlp.down_proj.scales", "model.layers.0.mlp.down_proj"),
        (PROMPT, "model.layers.1.self_attn.v_proj.codes", "model.layers.1.self_attn.v_proj"),
        ("load_embeddings", "model.embed_tokens.codes", EMBED),
        ("gather_embeddings_32", "model.embed_tokens.scales", EMBED),
        (PROMPT, "rope.sin", items.ROPE),
        (DECODE, "model.norm.weight", "model.norm.weight"),
    ],
)
def test_a_number_that_one_function_has_otherwise_is_named(
    graph: str, name: str, item: str, quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    hurt = copied(artifact, tmp_path / "a")
    coreai.rewritten(hurt.folder / ASSET, coreai.number(name, 301, 0x10, graph))
    assert {finding.item for finding in read_back(hurt, quantized).wrong} == {item}


SEEN = [
    (PROMPT, coreai.taken(PROMPT, "coreai.slice_update", 0, 1, 4)),
    (DECODE, coreai.unmasked(DECODE)),
    (DECODE, coreai.number("lm_head.scales", 301, 0x10, DECODE)),
]


@pytest.mark.parametrize(("graph", "change"), SEEN, ids=["keys for values", "no mask", "a scale"])
def test_answers_tell_of_a_damage_to_one_function(
    graph: str, change: Any, quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path, child: Child
) -> None:
    """That function alone ran where they are others."""
    hurt = copied(artifact, tmp_path / "a")
    coreai.rewritten(hurt.folder / ASSET, change)
    tokens = np.random.default_rng(2).integers(10, 6000, 70).tolist()
    wanted = TorchRuntime(quantized, CONTEXT).logits(tokens)
    child.call(Open(str(hurt.folder / ASSET), "main", CONTEXT, 2), 600)
    found = asked(child, Step(tokens[:-1], 0))  # by `extend` of a chunk alone
    near = 2e-3 * np.abs(wanted).max()
    assert np.abs(found - wanted[:-1]).max() < near
    step = Step(tokens, 0, last=True) if graph == PROMPT else Step(tokens[-1:], 69)
    assert np.abs(asked(child, step)[-1] - wanted[-1]).max() > 1.5 * near


def test_buffers_that_are_laid_out_otherwise_are_named(
    quantized: QuantizedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.coreai.static import program

    monkeypatch.setattr(program, "_laid_out", lambda made, *_: made)
    made = export_static(quantized, tmp_path / "a", context=CONTEXT, chunk=CHUNK)
    (wrong,) = read_back(made, quantized).wrong
    assert "embedding_table is laid out as nothing says instead of" in str(wrong)


def test_the_same_checkpoint_gives_the_same_bytes(
    quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    again = export_static(quantized, tmp_path / "a", context=CONTEXT, chunk=CHUNK)
    assert again.files == artifact.files


def test_a_program_that_apples_engine_would_not_open_is_not_written(
    quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="a prefill chunk of 40 tokens does not divide a context of 192"):
        export_static(quantized, tmp_path / "a", context=CONTEXT, chunk=40)
    with pytest.raises(TargetError, match=r"(?s)a context of 96 tokens beside caches of 128 channels.*--context 128"):
        export_static(quantized, tmp_path / "a", context=96, chunk=32)
    with pytest.raises(TargetError, match="no zero points"):
        held = rounded(tmp_path / "quantized", blocks=1, symmetric=False)
        export_static(held, tmp_path / "a", context=CONTEXT, chunk=CHUNK)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("left", "last_alone", "name", "tokens"),
    [
        (1, True, contract.extend(512, 1), 1),
        (2, True, contract.extend(512, 128), 128),
        (128, True, contract.extend(512, 128), 128),
        (129, True, contract.prompt(512, 128), 128),
        (129, False, contract.extend(512, 128), 128),
    ],
)
def test_functions_are_chosen_as_the_engine_chooses(left: int, last_alone: bool, name: str, tokens: int) -> None:
    """`forwardGraph` of StaticShapeEngine.swift."""
    assert contract.chosen(512, (128, 1), left, last_alone) == (name, tokens)
