"""What a finished .tflite holds against its checkpoint: a file that is changed in one place has that place named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.litert import export as litert
from export.lowering.ranges import calibrate
from export.readback import read_back
from tests.support.checkpoints.families import glm
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.edits.litert import (
    Change,
    Op,
    byte,
    exchanged,
    number,
    operator,
    rewritten,
    row_scale,
    schema,
    soft,
    tensors,
)


def uncached(entry: Any, model: Any) -> None:
    """Keys before the step's own alone, twice."""
    entry.inputs = [entry.inputs[0], entry.inputs[0]]


def becomes_multiplication(entry: Any, model: Any) -> None:
    entry.opcodeIndex = [code.builtinCode for code in model.operatorCodes].index(Op.MUL)
    entry.builtinOptionsType, entry.builtinOptions = schema.BuiltinOptions.MulOptions, schema.MulOptionsT()


def another_signature(model: Any, contents: list[bytearray]) -> None:
    model.signatureDefs[1].signatureKey = b"decodo"


def same_graph_twice(model: Any, contents: list[bytearray]) -> None:
    model.signatureDefs[1].subgraphIndex = 0


def shorter_mask(model: Any, contents: list[bytearray]) -> None:
    for tensor in tensors(model, "mask"):
        tensor.shape = [*tensor.shape[:-1], 24]


def half_cache(model: Any, contents: list[bytearray]) -> None:
    tensors(model, "past_keys.1")[0].type = 1


BLOCK = "model.layers.1"
NORMS = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")]
EPSILONS = [f"{name} epsilon" for name in [*NORMS, "model.norm"]]
DAMAGES: dict[str, tuple[Change, list[str]]] = {
    "a code": (byte(f"{BLOCK}.mlp.up_proj", 70, 0x10), [f"{BLOCK}.mlp.up_proj"]),
    "a code of the head": (byte("lm_head", 700, 1), ["lm_head"]),
    "a scale of a group": (byte(f"{BLOCK}.self_attn.k_proj.scales", 6, 1), [f"{BLOCK}.self_attn.k_proj"]),
    "a scale of a row": (row_scale("lm_head"), ["lm_head"]),
    "a norm": (number(f"{BLOCK}.post_attention_layernorm", 3, lambda x: np.nextafter(x, x + 1)),
               [f"{BLOCK}.post_attention_layernorm.weight"]),
    "the last norm": (number("model.norm", 3, lambda x: -x), ["model.norm.weight"]),
    "eps x10": (number("epsilon", 0, lambda x: x * 10), EPSILONS),
    "scale of attention": (number("layers.1.q_scaled.factor", 0, lambda x: x * 1.01), [f"{BLOCK} attention scale"]),
    "a cosine far away": (number("rope.cos.table", -3, lambda x: x + 1e-7), ["rope"]),
    "sines that turn back": (number("rope.sin.table", 40, lambda x: -x), ["rope"]),
    "norms exchanged": (exchanged(f"{BLOCK}.input_layernorm", f"{BLOCK}.post_attention_layernorm"),
                        [f"{BLOCK}.input_layernorm.weight", f"{BLOCK}.post_attention_layernorm.weight"]),
    "weights exchanged": (exchanged(f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.gate_proj"),
                          [f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"]),
    "a softer softmax": (operator(Op.SOFTMAX, 1, soft), ["operations"]),
    "a forgotten step": (operator(Op.CONCATENATION, 1, uncached), ["operations"]),
    "a product for a sum": (operator(Op.ADD, 0, becomes_multiplication), ["operations"]),
    "a shape": (byte("integers.1x8x64", 4, 1), ["operations"]),
    "a signature's name": (another_signature, ["metadata"]),
    "prefill for decode": (same_graph_twice, ["metadata"]),
    "a shorter mask": (shorter_mask, ["context", "operations"]),
    "another cache": (half_cache, ["KV cache", "operations"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("litert")
    return rounded(folder / "quantized", source=write_checkpoint(folder / "float", vocab=384))


@pytest.fixture(scope="module")
def sound(model: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return litert.export(model, tmp_path_factory.mktemp("litert") / "artifact", context=32, chunk=8)


def damaged(sound: Artifact, folder: Path, change: Change) -> Artifact:
    """Beside it artifact.json says the old sizes; nothing opens it again."""
    shutil.copytree(sound.folder, folder)
    made = Artifact.open(folder)
    rewritten(folder / "model.tflite", change)
    return made


@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_changed_in_the_file_is_named(
    model: QuantizedCheckpoint, sound: Artifact, name: str, tmp_path: Path
) -> None:
    change, wrong = DAMAGES[name]
    found = read_back(damaged(sound, tmp_path / "a", change), model)
    assert sorted({finding.item for finding in found.wrong}) == sorted(wrong), found
    assert not found.untold


def test_a_constant_is_told_as_found_and_as_it_should_be(
    model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path
) -> None:
    change, _ = DAMAGES["a shape"]
    told = [finding.told for finding in read_back(damaged(sound, tmp_path / "a", change), model).wrong]
    assert any("integers.1x8x64: 9 instead of 8" in line for line in told), told


def test_a_file_that_is_written_again_is_the_same_to_the_reader(
    model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path
) -> None:
    assert not read_back(sound, model).wrong
    assert not read_back(damaged(sound, tmp_path / "a", lambda *_: None), model).wrong


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_narrow_caches_are_held_against_their_ranges(model: QuantizedCheckpoint, kv_bits: Any, tmp_path: Path) -> None:
    ranges = calibrate(model, torch.arange(5, 37)[None])
    made = litert.export(model, tmp_path / "a", context=32, chunk=8, kv_bits=kv_bits, ranges=ranges)
    found = read_back(made, model)
    assert not found.wrong and not found.untold

    def rescaled(tables: Any, contents: list[bytearray]) -> None:
        for name in ("past_keys.1", "keys.1", "layers.1.keys.stored"):
            for tensor in tensors(tables, name):
                tensor.quantization.scale = [2 * tensor.quantization.scale[0]]

    if kv_bits == 8:
        hurt = read_back(damaged(made, tmp_path / "b", rescaled), model)
        assert "activation encodings" in {finding.item for finding in hurt.wrong}


def test_biases_are_held_too(tmp_path: Path) -> None:
    made = rounded(tmp_path / "quantized", source=glm(tmp_path / "float"), bits=8, group_size=-1)
    artifact = litert.export(made, tmp_path / "a", context=64, chunk=16)
    name = "model.layers.1.self_attn.v_proj.bias"
    one = damaged(artifact, tmp_path / "bias", number(name, 2, lambda x: x + 0.5))
    assert {finding.item for finding in read_back(one, made).wrong} == {name}
