"""ONNX artifacts read back: each kind of item, damaged in the finished file itself, is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto
from sentencepiece import sentencepiece_model_pb2

from bluelm.errors import InputError
from compress.checkpoint.store import EMBED
from compress.formats.adopt import adopt, given_recipe
from compress.formats.packed import PackedCheckpoint
from compress.recipe import Recipe
from export import readback
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.onnx import npu as onnx_npu
from export.onnx import readback as onnx_reader
from export.onnx.readback_constants import around, span
from export.readback import items
from tests.support.checkpoints import lowered as lowering
from tests.support.checkpoints.packed import V1, gptq, write_packed
from tests.support.damage import again
from tests.support.damages.onnx_edits import (
    Edit,
    add_constant,
    add_node,
    attribute,
    bump,
    cut_weights,
    edited,
    named_constant,
    narrowed,
    other_opset,
    quiet_border,
    rewire,
    shortened,
)
from tests.support.damages.record import copied

QWEN = {"architecture": "Qwen2ForCausalLM", "layer_norm": False}
NORM, BIAS = "model.layers.1.post_attention_layernorm", "model.layers.1.self_attn.k_proj.bias"


@cache
def made(kind: str, asymmetric: bool = False, kv_bits: Any = 32) -> Artifact:
    """Of a model with biases, made once; a wide chunk, so that prefill and decode differ much."""
    recipe = "w4-g32-asymmetric" if asymmetric else lowering.PLAIN
    source, folder = lowering.quantized(recipe, **QWEN), lowering.folder() / f"readback-{kind}-{asymmetric}-{kv_bits}"
    if kind == "onnx-npu":
        return onnx_npu.export(source, lowering.ranges(**QWEN), folder, context=32, chunk=8)
    export = {"onnx-cpu": onnx_cpu.export, "onnx-genai": onnx_genai.export}[kind]
    return export(source, folder, context=32, chunk=8, kv_bits=kv_bits, ranges=lowering.ranges(**QWEN))


def wrong(artifact: Artifact, asymmetric: bool = False) -> list[str]:
    """What is wrong in it, in words."""
    quantized = lowering.quantized("w4-g32-asymmetric" if asymmetric else lowering.PLAIN, **QWEN)
    return [str(finding) for finding in readback.read_back(artifact, quantized).wrong]


@pytest.mark.parametrize("kind", ["onnx-cpu", "onnx-npu", "onnx-genai"])
def test_nothing_is_wrong_nor_untold_in_a_sound_artifact(kind: str) -> None:
    found = readback.read_back(made(kind), lowering.quantized(**QWEN))
    assert not [str(finding) for finding in found.wrong]
    assert not found.sentences


FLOAT = [
    (bump("model.layers.1.mlp.up_proj.codes", 37), "model.layers.1.mlp.up_proj: codes"),
    (bump("lm_head.scales", 4), "lm_head: scales"),
    (bump(NORM), f"{NORM}.weight: {NORM} of ROLE.onnx has 1 other numbers, first at [0]"),
    (bump(BIAS, 9), f"{BIAS}: {BIAS} of ROLE.onnx has 1 other numbers, first at [2]"),
    (bump("rope.cos.table", 4 * 16 * 31 + 2), "rope: rope.cos.table of ROLE.onnx has 1 other numbers, first at [31"),
    (bump("rope.sin.table", 3), "rope: rope.sin.table of ROLE.onnx has 1 other numbers, first at [0, 0]"),
    (bump("layers.0.q_scaled.factor", 2), "model.layers.0 attention scale: layers.0.q_scaled.factor of ROLE.onnx has"),
    (bump("index.8"), "operations: index.8 of ROLE.onnx has 1 other numbers"),
    (shortened(NORM), f"{NORM}.weight: {NORM} is of another type or size than it says"),
    (narrowed(NORM), f"{NORM}.weight: {NORM} of ROLE.onnx is float16 [64] instead of float32 [64]"),
    (attribute("layers.1.mlp_norm", "epsilon", 1e-2), f"{NORM} epsilon: 0.01"),
    (attribute("layers.1.scores", "transA", 1), "operations: ROLE.onnx: node"),
    (rewire("layers.0.q_rope.cos", 1, "rope.sin"), "operations: ROLE.onnx: node"),
    (add_constant, "operations: more of ROLE.onnx belongs to nothing of the model"),
    (add_node, "operations: ROLE.onnx: node"),
    (other_opset, "operations: ROLE.onnx: opset_import of the file are others"),
    (cut_weights, "lm_head: the numbers of lm_head.codes cannot be read"),
    (quiet_border, "context: past_values.0 of ROLE.onnx is [1, 2, 7, 16]"),
]  # fmt: skip
INTEGER = [
    (bump("model.layers.1.mlp.up_proj.codes", 37), "model.layers.1.mlp.up_proj: codes"),
    (bump("model.layers.0.self_attn.v_proj.scales", 4), "model.layers.0.self_attn.v_proj: scales"),
    (bump(f"{NORM}.codes", 7), f"{NORM}.weight: {NORM}.codes of ROLE.onnx has 1 other numbers, first at [3]"),
    (bump(f"{BIAS}.codes", 9), f"{BIAS}: {BIAS}.codes of ROLE.onnx has 1 other numbers, first at [4]"),
    (bump("rope.sin.table.codes", 2 * 16 * 31), "rope: rope.sin.table.codes of ROLE.onnx has 1 other numbers"),
    (bump("layers.0.q_scaled.factor.codes"), "model.layers.0 attention scale: layers.0.q_scaled.factor.codes"),
    (bump("ones.codes", 5), "operations: ones.codes of ROLE.onnx has 1 other numbers"),
    (attribute("final_norm.unit.exact", "epsilon", 1e-2), "model.norm epsilon: 0.01"),
    (rewire("layers.0.up.codes", 1, "ones.scale"), "activation encodings: the scale of layers.0.up.codes of ROLE.onnx"),
    (rewire("layers.0.up", 2, "zero.uint16.0"), "activation encodings: the zero point of layers.0.up of ROLE.onnx"),
    (rewire("layers.1.down.exact", 0, "layers.1.up"), "operations: ROLE.onnx: node"),
    (add_constant, "operations: more of ROLE.onnx belongs to nothing of the model"),
]  # fmt: skip


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("kind", "edit", "told"),
    [*(("onnx-cpu", *row) for row in FLOAT), *(("onnx-npu", *row) for row in INTEGER)],
)
def test_each_damage_is_named_in_both_graphs(kind: str, edit: Edit, told: str, role: str, tmp_path: Path) -> None:
    found = wrong(edited(copied(made(kind), tmp_path / "a"), role, edit))
    assert any(told.replace("ROLE", role) in line for line in found), found


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (bump("embed.codes", 99), f"{EMBED}: codes"),
        (bump("embed.scales", 2), f"{EMBED}: scales"),
        (bump("model.layers.0.self_attn.qkv.codes", 64 * 32 + 5), "model.layers.0.self_attn.k_proj: codes"),
        (bump("model.layers.0.self_attn.o_proj.scales", 2), "model.layers.0.self_attn.o_proj: scales"),
        (bump(NORM), f"{NORM}.weight: {NORM} has other numbers"),
        (bump("model.layers.1.self_attn.qkv.bias"), f"{BIAS}: model.layers.1.self_attn.qkv.bias has other numbers"),
        (bump("rope.cos", 4 * 8 * 31), "rope: rope.cos has other numbers"),
        (bump("one"), "operations: one has other numbers"),
        (attribute(f"{NORM}.out", "epsilon", 1e-2), f"{NORM} epsilon: 0.01"),
        (attribute("model.norm.out", "epsilon", 1e-2), "model.norm epsilon: 0.01"),
        (attribute("model.layers.0.self_attn.mixed", "scale", 0.3), "model.layers.0 attention scale: scale is 0.3"),
        (attribute("model.layers.0.self_attn.mixed", "local_window_size", 9), "local_window_size is 9 instead of -1"),
        (attribute("model.layers.0.self_attn.mixed", "kv_num_heads", 4), "kv_num_heads is 4 instead of 2"),
        (attribute("model.layers.0.self_attn.mixed", "rotary_interleaved", 1), "rotary_interleaved is 1 instead of 0"),
        (attribute("model.layers.0.self_attn.mixed", "softcap", 1.0), "operations: model.onnx: node"),
        (attribute("model.layers.1.mlp.gate_proj.out.silu", "alpha", 1.7), "alpha is 1.7"),
        (rewire("model.layers.1.mlp.inner", 0, "model.layers.1.mlp.up_proj.out"), "operations: model.onnx: node"),
        (add_constant, "operations: more belongs to nothing of the model"),
        (named_constant("layers.0.keys.scale"), "operations: layers.0.keys.scale belongs to nothing of the model"),
        (shortened(NORM), f"{NORM}.weight: {NORM} is of another type or size than it says"),
        (shortened("rope.sin"), "rope: rope.sin is of another type or size than it says"),
    ],
)  # fmt: skip
def test_each_damage_of_genais_graph_is_named(edit: Edit, told: str, tmp_path: Path) -> None:
    found = wrong(edited(copied(made("onnx-genai"), tmp_path / "a"), "model", edit))
    assert any(told in line for line in found), found


@pytest.mark.parametrize("kind", ["onnx-cpu", "onnx-genai"])
def test_a_zero_point_of_a_group_is_read_back(kind: str, tmp_path: Path) -> None:
    assert not wrong(made(kind, asymmetric=True), asymmetric=True)
    role = "model" if kind == "onnx-genai" else "prefill"
    name = "model.layers.1.mlp.down_proj"
    hurt = edited(copied(made(kind, asymmetric=True), tmp_path / "a"), role, bump(f"{name}.zeros", 11))
    found = wrong(hurt, asymmetric=True)
    assert f"{name}: zero points" in found


@pytest.mark.parametrize("exporter", [onnx_cpu, onnx_genai])
def test_how_a_product_is_computed_is_a_choice(exporter: Any, tmp_path: Path) -> None:
    quantized = lowering.quantized(**QWEN)
    artifact = exporter.export(quantized, tmp_path / "a", context=32, chunk=8, accuracy_level=4)
    assert not wrong(artifact)

    def mixed(model: ModelProto, folder: Path) -> None:
        name = next(node.name for node in model.graph.node if node.op_type == "MatMulNBits")
        attribute(name, "accuracy_level", 1)(model, folder)

    hurt = edited(artifact, "model" if exporter is onnx_genai else "decode", mixed)
    assert any("operations: " in line for line in wrong(hurt))  # the same in all nodes


@pytest.mark.parametrize("kind", ["onnx-cpu", "onnx-genai"])
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_narrow_caches_are_read_back(kind: str, kv_bits: int, tmp_path: Path) -> None:
    artifact = made(kind, kv_bits=kv_bits)
    found = readback.read_back(artifact, lowering.quantized(**QWEN))
    assert not found.wrong and not found.untold
    claimed = copied(artifact, tmp_path / "claimed")
    claimed.model_copy(update={"cache": "float32"}).save(claimed.folder)
    assert any(line.startswith("KV cache: ") for line in wrong(Artifact.open(claimed.folder)))
    if kv_bits == 16:
        return
    without = copied(artifact, tmp_path / "without")
    kept = tuple(file for file in without.files if file.role != "ranges")
    without.model_copy(update={"files": kept}).save(without.folder)
    untold = readback.read_back(Artifact.open(without.folder), lowering.quantized(**QWEN))
    assert {finding.item for finding in untold.untold} == {items.ENCODINGS, items.GRAPH}
    role = "model" if kind == "onnx-genai" else "decode"

    def widen(model: ModelProto, folder: Path) -> None:
        for initializer in model.graph.initializer:
            if initializer.name.startswith("scale.") or initializer.name.endswith(".keys.scale"):
                initializer.raw_data = (2 * np.frombuffer(initializer.raw_data, np.float32)).tobytes()

    hurt = wrong(edited(copied(artifact, tmp_path / "wide"), role, widen))
    assert any(line.startswith("activation encodings: ") for line in hurt), hurt


@pytest.mark.parametrize("exporter", [onnx_cpu, onnx_genai])
def test_the_order_of_a_weights_inputs_is_held(exporter: Any, tmp_path: Path) -> None:
    """Another tool's codes whose groups are scattered over the columns."""
    write_packed(tmp_path / "m", gptq, V1 | {"desc_act": True}, scattered=True)
    packed = PackedCheckpoint.open(tmp_path / "m")
    quantized = adopt(packed, given_recipe(packed, Recipe()), tmp_path / "codes")
    artifact = exporter.export(quantized, tmp_path / "a", context=32, chunk=8)
    assert not readback.read_back(artifact, quantized).wrong
    name = next(name for name, info in quantized.linears.items() if info.ordered and name.endswith("o_proj"))
    role, item = ("model", items.GRAPH) if exporter is onnx_genai else ("decode", name)
    hurt = edited(artifact, role, bump(f"{name}.order", 8))
    found = [str(finding) for finding in readback.read_back(hurt, quantized).wrong]
    assert any(line.startswith(f"{item}: {name}.order ") and " other numbers" in line for line in found), found


def test_rows_of_the_embedding_beside_the_graphs(tmp_path: Path) -> None:
    for part, told in (("codes", "codes"), ("scales", "scales"), ("zeros", "zero points")):
        hurt = copied(made("onnx-cpu"), tmp_path / part)
        path = hurt.path("embedding")
        data = bytearray(path.read_bytes())
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        data[8 + int.from_bytes(data[:8], "little") + header[part]["data_offsets"][0] + 40] ^= 1
        path.write_bytes(bytes(data))
        EmbeddingTable.open(path)
        assert wrong(again(hurt)) == [f"{EMBED}: {told}"]


GENAI_FIELDS: dict[str, Any] = {
    "model.bos_token_id": 5,
    "model.eos_token_id": 7,
    "model.pad_token_id": 9,
    "model.vocab_size": 100,
    "model.context_length": 31,
    "model.type": "gemma",
    "model.decoder.filename": "other.onnx",
    "model.decoder.head_size": 8,
    "model.decoder.hidden_size": 128,
    "model.decoder.num_attention_heads": 2,
    "model.decoder.num_key_value_heads": 4,
    "model.decoder.num_hidden_layers": 1,
    "model.decoder.sliding_window": {"window_size": 20, "alignment": "left"},
    "model.decoder.inputs.input_ids": "ids",
    "model.decoder.outputs.present_key_names": "present.%d.value",
    "model.decoder.session_options.provider_options": [{"cuda": {}}],
    "search.do_sample": True,
    "search.temperature": 2.0,
    "search.top_k": 3,
    "search.repetition_penalty": 1.5,
    "search.max_length": 16,
    "search.num_beams": 4,
    "search.past_present_share_buffer": False,
    "search.chunk_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("field", GENAI_FIELDS)
def test_each_field_of_genai_config_is_held(field: str, tmp_path: Path) -> None:
    hurt = copied(made("onnx-genai"), tmp_path / "a")
    path = hurt.path("genai")
    config = json.loads(path.read_text())
    *place, last = field.split(".")
    below = config
    for name in place:
        below = below[name]
    assert below.get(last) != GENAI_FIELDS[field]
    below[last] = GENAI_FIELDS[field]
    path.write_text(json.dumps(config))
    (told,) = {line.partition(" says ")[2].split(" ")[0].removesuffix(".window_size") for line in wrong(again(hurt))
               if "alignment" not in line}  # fmt: skip
    assert told == field


@pytest.mark.parametrize("kind", ["onnx-cpu", "onnx-npu", "onnx-genai"])
def test_what_lies_beside_is_held_whole(kind: str, tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[Path], object]) -> list[str]:
        hurt = copied(made(kind), tmp_path / f"a{len(list(tmp_path.iterdir()))}")
        change(hurt.folder / name)
        return wrong(again(hurt))

    def field(name: str, value: Any) -> Callable[[Path], object]:
        return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    def piece(**values: Any) -> Callable[[Path], object]:
        def change(path: Path) -> None:
            model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
            model.ParseFromString(path.read_bytes())
            for name, value in values.items():
                setattr(model.pieces[300], name, value)
            path.write_bytes(model.SerializeToString())

        return change

    assert changed("config.json", field("rms_norm_eps", 1e-2)) == ["config.json: rms_norm_eps is 0.01 instead of 1e-06"]
    assert changed("config.json", field("num_key_value_heads", 4)) == [
        "config.json: num_key_value_heads is 4 instead of 2"
    ]
    assert changed("config.json", field("bos_token_id", True)) == ["config.json: bos_token_id is true instead of 1"]
    for values in ({"score": -1.5}, {"piece": "other"}, {"type": 5}):
        (told,) = changed("tokenizer.model", piece(**values))
        assert told.startswith("tokenizer.model: piece 300 is ")
    more = ["special_tokens_map.json", *(["tokenizer.json"] if kind != "onnx-genai" else [])]  # which makes this one
    for name in more:
        assert changed(name, lambda path: path.write_text("{}")) == [f"{name}: the checkpoint has no such file"]
    hurt = copied(made(kind), tmp_path / "model")
    held = replace(hurt.model, rope_theta=500000.0, num_kv_heads=4)
    hurt.model_copy(update={"model": held}).save(hurt.folder)
    found = wrong(Artifact.open(hurt.folder))
    assert "artifact.json: rope_theta is 500000.0 instead of 10000.0" in found
    assert "artifact.json: num_kv_heads is 4 instead of 2" in found
    hurt.model_copy(update={"quantized_digest": "0" * 64}).save(hurt.folder)
    assert "artifact.json: quantized_digest is that of another quantized checkpoint" in wrong(
        Artifact.open(hurt.folder)
    )


@pytest.mark.parametrize("kind", ["onnx-cpu", "onnx-npu"])
def test_the_mask_and_the_context_are_held(kind: str, tmp_path: Path) -> None:
    hurt = copied(made(kind), tmp_path / "a")
    hurt.model_copy(update={"mask_value": -1.0}).save(hurt.folder)
    assert any(line.startswith("mask value: -1.0 instead of ") for line in wrong(Artifact.open(hurt.folder)))
    hurt.model_copy(update={"context": 64}).save(hurt.folder)
    assert any(line.startswith("context: ") for line in wrong(Artifact.open(hurt.folder)))


def test_ranges_of_another_checkpoint_are_named(tmp_path: Path) -> None:
    hurt = copied(made("onnx-npu"), tmp_path / "a")
    path = hurt.path("ranges")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "0" * 64}))
    assert "activation encodings: ranges.json is of another quantized checkpoint" in wrong(again(hurt))


def test_what_a_reader_forgets_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, quantized = made("onnx-cpu"), lowering.quantized(**QWEN)

    def most(artifact: Artifact, quantized: Any) -> Any:
        return (f for f in everything(artifact, quantized) if f.item not in (items.ROPE, f"{NORM}.weight"))

    everything = onnx_reader.findings
    monkeypatch.setattr(onnx_reader, "findings", most)
    found = readback.read_back(artifact, quantized)
    assert [str(finding) for finding in found.wrong] == [f"{NORM}.weight: was not read back", "rope: was not read back"]


def test_parts_are_read_back_one_by_one(tmp_path: Path) -> None:
    source, ranges = lowering.quantized(**QWEN), lowering.ranges(**QWEN)
    whole = onnx_npu.export(source, ranges, tmp_path / "a", context=32, chunk=8, part_bytes=40_000)
    assert len(whole.paths("prefill")) > 1
    assert not wrong(whole)
    first, second = (whole.folder / f"prefill_{index}.onnx" for index in (1, 2))
    kept = first.read_bytes()
    shutil.copyfile(second, first)
    second.write_bytes(kept)
    assert any("the parts do not make up" in line for line in wrong(again(whole)))


def test_encodings_are_those_of_onnx() -> None:
    """Known answers: 8-bit example of the ONNX specification's formula, and a symmetric one."""
    scale, zero = span(-1.0, 2.0, np.uint8)
    assert (scale, zero) == (np.float32(3 / 255), 85)
    scale, zero = around(-0.5, 0.25, np.int16)
    assert (scale, zero) == (np.float32(0.5 / 32767), 0)
    assert span(0.0, 0.0) == (np.float32(1), 0)


@pytest.mark.parametrize("kind", ["onnx-cpu", "onnx-npu", "onnx-genai"])
def test_files_of_changed_bytes_are_wrong_or_bad_input(kind: str, tmp_path: Path) -> None:
    """One byte at a time: what still reads as ONNX is told apart from what was written."""
    roles = {"onnx-genai": ("model",)}.get(kind, ("prefill", "decode"))
    random = np.random.default_rng(3)
    for number in range(24):
        hurt = copied(made(kind), tmp_path / str(number))
        path = hurt.path(roles[number % len(roles)])
        data = bytearray(path.read_bytes())
        data[random.integers(len(data))] ^= int(random.integers(1, 256))
        path.write_bytes(bytes(data))
        with suppress(InputError):
            assert wrong(again(hurt))
