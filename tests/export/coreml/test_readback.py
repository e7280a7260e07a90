"""What a finished Core ML package holds against its checkpoint: a package changed in one place has that place named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.coreml import export as coreml
from export.coreml.export import packages
from export.coreml.package import Package
from export.readback import read_back
from tests.support.checkpoints.families import glm
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.edits.coreml import Change, blob, exchanged, immediate, kind, operation, source, value


def smaller_cache(package: Package) -> None:
    for function in package.spec.mlProgram.functions.values():
        for named in function.inputs:
            if named.name == "layers_0_keys":
                named.type.stateType.wrappedType.tensorType.dimensions[3].constant.size = 24


def wide_cache(package: Package) -> None:
    for function in package.spec.mlProgram.functions.values():
        for named in function.inputs:
            if named.name == "layers_0_keys":
                named.type.stateType.wrappedType.tensorType.dataType = 11  # FLOAT32


def other_checkpoint(package: Package) -> None:
    package.spec.description.metadata.userDefined["quantized"] = "0" * 64


def no_decode(package: Package) -> None:
    package.spec.mlProgram.functions["decode"].CopyFrom(package.spec.mlProgram.functions["prefill"])


BLOCK, AT = "model.layers.1", "model_layers_1"
DAMAGES: dict[str, tuple[Change, list[str]]] = {
    "a code": (blob(f"{AT}_mlp_up_proj", 70, 0x10, "data"), [f"{BLOCK}.mlp.up_proj"]),
    "a scale": (blob(f"{AT}_self_attn_k_proj", 6, 1, "scale"), [f"{BLOCK}.self_attn.k_proj"]),
    "a code of the head": (blob("lm_head", 700, 1, "data"), ["lm_head"]),
    "a code of the table": (blob("embed_codes", 700, 1), ["model.embed_tokens"]),
    "a scale of the table": (blob("embed_scales", 70, 1), ["model.embed_tokens"]),
    "a norm": (blob(f"{AT}_post_attention_layernorm_doubled", 6, 1), [f"{BLOCK}.post_attention_layernorm.weight"]),
    "a norm's second half": (blob("model_norm_doubled", 132, 1), ["model.norm.weight"]),
    "a cosine": (blob("rope_cos_table", 900, 1), ["rope"]),
    "a sine": (blob("rope_sin_table", 901, 0x80), ["rope"]),
    "which slots are seen": (blob("mask_seen_x_0", 8, 1), ["operations"]),
    "eps x10": (immediate("layers_1_mlp_norm_layer_norm_epsilon_0", 10), [f"{BLOCK}.post_attention_layernorm epsilon"]),
    "eps of prefill": (immediate("final_norm_layer_norm_epsilon_0", 10, "prefill"), ["model.norm epsilon"]),
    "scale of attention": (immediate("layers_1_q_scaled_y_0", 1.01), [f"{BLOCK} attention scale"]),
    "mask": (immediate("mask_b_0", 0.001), ["operations"]),
    "norms exchanged": (exchanged(f"{AT}_input_layernorm_doubled", f"{AT}_post_attention_layernorm_doubled", "val"),
                        [f"{BLOCK}.input_layernorm.weight", f"{BLOCK}.post_attention_layernorm.weight"]),
    "weights exchanged": (exchanged(f"{AT}_mlp_up_proj", f"{AT}_mlp_gate_proj", "data"),
                          [f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"]),
    "another operation": (operation("layers_1_gate_silu", kind("relu")), ["operations"]),
    "attention left out": (operation("layers_1_attention_residual", source("y", "layers_1_q")), ["operations"]),
    "values for keys": (operation("layers_1_mixed", source("y", "layers_1_keys_after")), ["operations"]),
    "slots": (smaller_cache, ["context", "operations"]),
    "type of the cache": (wide_cache, ["KV cache", "operations"]),
    "another checkpoint": (other_checkpoint, ["metadata"]),
    "prefill for decode": (no_decode, ["operations"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("coreml")
    return rounded(folder / "quantized", source=write_checkpoint(folder / "float", vocab=384))


@pytest.fixture(scope="module")
def sound(model: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return coreml.export(model, tmp_path_factory.mktemp("coreml") / "artifact", context=32, chunk=8)


def damaged(sound: Artifact, folder: Path, change: Change, part: int = 0) -> Artifact:
    """A copy, changed; artifact.json says the old sizes, and nothing opens it again."""
    shutil.copytree(sound.folder, folder)
    made = Artifact.open(folder)
    package = Package.open(packages(made)[part])
    change(package)
    (package.root / "model.mlmodel").write_bytes(package.spec.SerializeToString(deterministic=True))
    return made


def wrong(artifact: Artifact, model: QuantizedCheckpoint) -> list[str]:
    found = read_back(artifact, model)
    assert not found.untold
    return sorted({finding.item for finding in found.wrong})


@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_changed_in_the_package_is_named(
    model: QuantizedCheckpoint, sound: Artifact, name: str, tmp_path: Path
) -> None:
    change, expected = DAMAGES[name]
    assert wrong(damaged(sound, tmp_path / "a", change), model) == sorted(expected)


def test_an_operation_is_told_with_what_it_reads(model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path) -> None:
    change, _ = DAMAGES["another operation"]
    told = [finding.told for finding in read_back(damaged(sound, tmp_path / "a", change), model).wrong]
    gate = "layers_1_gate_silu of layers_1_gate"
    assert any(f"relu {gate}" in line and f" instead of silu {gate}" in line for line in told), told


def test_a_constant_that_points_outside_is_told(model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path) -> None:
    def away(package: Package) -> None:
        value(package, "decode", "rope_cos_table").blobFileValue.offset = 1 << 40

    found = {finding.item: finding.told for finding in read_back(damaged(sound, tmp_path / "a", away), model).wrong}
    assert "rope" in found and str(found["rope"]) not in ("", "None")


def test_each_of_several_packages_is_held_against_its_part(model: QuantizedCheckpoint, tmp_path: Path) -> None:
    made = coreml.export(model, tmp_path / "a", context=32, chunk=8, program_bytes=64_000)
    assert len(packages(made)) > 1
    assert wrong(made, model) == []
    cut = damaged(made, tmp_path / "b", blob("lm_head", 700, 1, "data"), part=-1)
    assert wrong(cut, model) == ["lm_head"]
    twice = damaged(made, tmp_path / "c", lambda _: None)
    first, second = packages(twice)[:2]
    shutil.rmtree(second)
    shutil.copytree(first, second)
    assert "operations" in {finding.item for finding in read_back(twice, model).wrong}


def test_biases_and_zero_points_are_held_too(tmp_path: Path) -> None:
    widths = {"bits": 4, "group_size": 32, "symmetric": False}
    source = rounded(tmp_path / "quantized", source=glm(tmp_path / "float"), **widths)
    made = coreml.export(source, tmp_path / "a", context=64, chunk=16, activations="float32")
    assert wrong(made, source) == []
    zeros = damaged(made, tmp_path / "zeros", blob(f"{AT}_mlp_up_proj", 3, 1, "offset"))
    assert wrong(zeros, source) == [f"{BLOCK}.mlp.up_proj"]
    bias = damaged(made, tmp_path / "bias", blob(f"{AT}_self_attn_v_proj_bias", 3, 1))
    assert wrong(bias, source) == [f"{BLOCK}.self_attn.v_proj.bias"]
