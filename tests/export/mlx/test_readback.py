"""What a small MLX folder holds against its checkpoint: every place that is changed is named, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.mlx.export import export
from export.mlx.readback import findings
from export.readback.items import inventory
from tests.support.checkpoints import lowered as lowering

SHAPES: dict[str, dict[str, Any]] = {
    "BlueLM": {},
    "Qwen2": {"architecture": "Qwen2ForCausalLM", "layer_norm": False},
    "Qwen3": {"architecture": "Qwen3ForCausalLM", "layer_norm": False, "head_dim": 32},
    "tied": {"architecture": "LlamaForCausalLM", "layer_norm": False, "tied": True},
}
Tensors = dict[str, np.ndarray]
NORM, UP, DOWN = "model.norm.weight", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


@cache
def made(shape: str = "BlueLM") -> tuple[QuantizedCheckpoint, Artifact]:
    quantized = lowering.quantized(lowering.PLAIN if shape == "tied" else "w8-row-head4", **SHAPES[shape])
    if shape == "Qwen2":
        quantized = replace(quantized, config=replace(quantized.config, eos_token_ids=(2, 5)))
    about = {"name": "A demo", "license": "mit"}
    return quantized, export(quantized, lowering.folder() / f"mlx-{shape}", context=48, about=about)


def wrong(change: Callable[[Path], None], folder: Path, shape: str = "BlueLM") -> dict[str, str]:
    """What is found in a changed copy, by item."""
    quantized, sound = made(shape)
    shutil.copytree(sound.folder, folder / "a")
    hurt = Artifact.open(folder / "a")
    change(hurt.folder / "model")
    return {found.item: found.told for found in findings(hurt, quantized) if found.state == "wrong"}


def config(**values: Any) -> Callable[[Path], None]:
    """Other values of config.json; None: not there."""

    def change(folder: Path) -> None:
        table = json.loads((folder / "config.json").read_text()) | values
        kept = {key: value for key, value in table.items() if key not in values or value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def tensors(edit: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        edit(held)
        save_file(held, folder / "model.safetensors")

    return change


def flipped(name: str) -> Callable[[Path], None]:
    """The last bit of the last number of a tensor."""

    def edit(held: Tensors) -> None:
        held[name] = held[name].copy()
        held[name].view(np.uint8).reshape(-1)[-held[name].itemsize] ^= 1

    return tensors(edit)


def widened(name: str) -> Callable[[Path], None]:
    return tensors(lambda held: held.update({name: held[name].astype(np.float32)}))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sound_folder_is_right_in_every_item(shape: str) -> None:
    quantized, artifact = made(shape)
    found = list(findings(artifact, quantized))
    assert [str(one) for one in found if one.state != "right"] == []
    assert sorted(one.item for one in found) == sorted(inventory(artifact, quantized))


NORMS = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")]
EPSILONS = {f"{name} epsilon" for name in (*NORMS, "model.norm")}
CONFIGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "context": ({"max_position_embeddings": 64}, {"context"}),
    "rope base": ({"rope_theta": 10010.0}, {"rope"}),
    "rope by half": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope"}),
    "activation": ({"hidden_act": "gelu"}, {"operations"}),
    "another model": ({"model_type": "qwen2"}, {"operations"}),
    "biases": ({"attention_bias": True}, {"operations"}),
    "biases of the MLP": ({"mlp_bias": True}, {"operations"}),
    "something more": ({"sliding_window": 16}, {"operations"}),
    "something less": ({"torch_dtype": None}, {"operations"}),
    "begin token": ({"bos_token_id": 5}, {"metadata"}),
    "end token": ({"eos_token_id": 7}, {"metadata"}),
    "padding": ({"pad_token_id": 7}, {"metadata"}),
    "told twice": ({"quantization_config": {"bits": 8}}, {"metadata"}),
    "eps": ({"rms_norm_eps": 1e-2}, {"operations", *EPSILONS}),
    "heads": ({"head_dim": 32}, {"operations", "model.layers.0 attention scale", "model.layers.1 attention scale"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_setting_is_named(name: str, tmp_path: Path) -> None:
    values, items = CONFIGS[name]
    assert set(wrong(config(**values), tmp_path)) == items


def test_how_weights_are_held_is_told_of_each(tmp_path: Path) -> None:
    held = {"group_size": 64, "bits": 8, "mode": "affine", DOWN: {"group_size": 32, "bits": 8}}
    both = {"quantization": held, "quantization_config": held}
    found = wrong(config(**both), tmp_path)
    assert set(found) == {"lm_head", "model.layers.0.mlp.down_proj"}
    assert found["lm_head"] == "8 bits in groups of 64 instead of 4 bits in groups of 64"
    (tmp_path / "b").mkdir()
    other = held | {"mode": "mxfp4"}
    assert "lm_head" in wrong(config(quantization=other, quantization_config=other), tmp_path / "b")


NUMBERS: dict[str, tuple[Callable[[Path], None], dict[str, str]]] = {
    "a code": (flipped(f"{UP}.weight"), {UP: "codes"}),
    "a scale": (flipped(f"{UP}.scales"), {UP: "scales"}),
    "a repeated scale": (flipped(f"{DOWN}.scales"), {DOWN: "scales"}),
    "a bias": (flipped(f"{UP}.biases"), {UP: "zero points"}),
    "wide scales": (widened(f"{UP}.scales"), {UP: "scales"}),
    "wide biases": (widened(f"{UP}.biases"), {UP: "zero points"}),
    "no scales": (tensors(lambda held: held.pop(f"{UP}.scales")), {UP: "is missing, or not quantized"}),
    "fewer scales": (
        tensors(lambda held: held.update({f"{DOWN}.scales": held[f"{DOWN}.scales"][:, :1].copy()})),
        {DOWN: "8 bits in groups of 32 instead of 8 bits in groups of 96"},
    ),
    "a norm": (flipped(NORM), {NORM: "other numbers"}),
    "a wide norm": (widened(NORM), {NORM: "other numbers"}),
    "no norm": (tensors(lambda held: held.pop(NORM)), {NORM: "other numbers"}),
    "one more": (tensors(lambda held: held.update(more=np.zeros(3))), {"operations": "more is none of this model's"}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_changed_number_is_named(name: str, tmp_path: Path) -> None:
    change, told = NUMBERS[name]
    assert wrong(change, tmp_path) == told


def test_a_head_of_its_own_is_named_where_the_table_is_the_head(tmp_path: Path) -> None:
    found = wrong(config(tie_word_embeddings=False), tmp_path, "tied")
    assert found.pop("lm_head") == "False instead of True" and set(found) == {"operations"}


def test_a_rope_that_mlx_does_not_make_is_named(tmp_path: Path) -> None:
    assert "MLX makes no rope" in wrong(config(rope_scaling={"rope_type": "other"}), tmp_path)["rope"]


CARD = '---\nlibrary_name: "mlx"\n'


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (f'{CARD}license: "mit"\n---\n\n# Another\n', "# A demo"),
        (f"{CARD}---\n\n# A demo\n", "license"),
        (None, "demo"),
    ],
)
def test_a_card_that_says_something_else_is_named(text: str | None, lacks: str, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        (folder / "README.md").unlink()
        if text is not None:
            (folder / "README.md").write_text(text)

    found = wrong(change, tmp_path)
    assert set(found) == {"metadata"} and "README.md does not say" in found["metadata"]
    assert lacks in found["metadata"] or text is None


def test_another_tokenizer_is_named(tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7]}))

    assert set(wrong(change, tmp_path)) == {"metadata"}
