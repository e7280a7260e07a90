"""What the writer of MLX's folders puts where: known answers, read with safetensors and json alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bluelm.config import ModelConfig, RopeScaling
from bluelm.errors import TargetError
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from compress.recipe import Recipe
from export.mlx.export import check_recipe, check_weight, export, model_card, pack, settings
from tests.support.checkpoints import lowered as lowering
from tests.support.checkpoints.shapes import config_dict
from tests.support.quantizing import Stopping


def weight(codes: torch.Tensor, bits: int, group: int = -1, scale: float = 0.5) -> QuantizedTensor:
    groups = 1 if group == -1 else codes.shape[1] // group
    scales = torch.full((len(codes), groups), scale, dtype=torch.float16)
    zeros = torch.full((len(codes), groups), 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedTensor(codes.to(torch.uint8), scales, zeros, bits, group)


def test_the_first_code_is_in_the_lowest_bits_of_a_word() -> None:
    counted = torch.arange(256).expand(2, -1)
    four = pack(weight(counted[:, :64] % 16, 4), "w")["weight"].numpy()
    assert four.dtype == np.uint32 and four.shape == (2, 8)
    assert four[1].tolist() == [0x76543210, 0xFEDCBA98] * 4
    eight = pack(weight(counted, 8), "w")["weight"].numpy()
    assert eight.shape == (2, 64) and eight[1, :2].tolist() == [0x03020100, 0x07060504]


def test_a_scale_of_more_columns_than_mlx_has_groups_for_is_repeated() -> None:
    made = weight(torch.zeros(2, 512), 4, 256)
    made.scales[:] = torch.tensor([[1, 2], [3, 4]])
    parts = pack(made, "w")
    assert parts["scales"].tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert parts["biases"].tolist() == [[-8, -8, -16, -16], [-24, -24, -32, -32]]
    assert parts["scales"].dtype == parts["biases"].dtype == torch.float16


def test_a_weight_that_mlx_cannot_hold_is_refused() -> None:
    sound = weight(torch.zeros(2, 96), 4)
    assert check_weight(sound, "w") == 32
    others = {
        "have more digits": replace(sound, scales=sound.scales.float()),
        "beyond float16": weight(torch.zeros(2, 96), 8, scale=600.0),  # 600 * 128 = 76,800
        "a scale here serves 16": weight(torch.zeros(2, 96), 4, 16),
        "scales and zero points exactly": replace(sound, zeros=sound.zeros + 1),
    }
    for why, other in others.items():
        with pytest.raises(TargetError, match=why) as error:
            check_weight(other, "w")
        assert error.value.where == "w"
    check_weight(weight(torch.zeros(2, 96), 8, scale=500.0), "w")


def test_the_head_of_a_recipe_is_looked_at_too() -> None:
    config = ModelConfig.from_dict(config_dict())
    check_recipe(config, Recipe.make({"group_size": 32, "head_group_size": -1}))
    with pytest.raises(TargetError, match="a scale here serves 16") as error:
        check_recipe(config, Recipe.make({"method": "given", "group_size": 32, "head_group_size": 16}))
    assert error.value.where == "lm_head"


def test_the_folder_holds_every_weight_and_says_how(tmp_path: Path) -> None:
    quantized, told = lowering.quantized("w8-row-head4", tokenizer=False), Stopping(0)
    made = export(quantized, tmp_path / "a", context=48, about={"name": "A demo", "license": "mit"}, progress=told)
    config, tensors = json.loads((made.folder / "model/config.json").read_text()), load_file(made.path("model"))
    downs = {f"model.layers.{layer}.mlp.down_proj": {"group_size": 32, "bits": 8} for layer in (0, 1)}
    held = {"group_size": 64, "bits": 8, "mode": "affine", "lm_head": {"group_size": 64, "bits": 4}, **downs}
    assert config["quantization"] == config["quantization_config"] == held
    assert config["max_position_embeddings"] == 48 and config["rope_scaling"] is None
    assert (made.folder / "model/README.md").read_text().splitlines()[:4] == [
        "---", 'library_name: "mlx"', 'license: "mit"', "---",
    ]  # fmt: skip
    parts = {f"{name}.{part}" for name in quantized.linears for part in ("weight", "scales", "biases")}
    vectors = {name for name in tensors if name.endswith("norm.weight")}
    assert set(tensors) == parts | vectors and len(vectors) == 5
    for name in vectors:
        np.testing.assert_array_equal(tensors[name], quantized.vector(name).numpy().astype(np.float16))
    words = tensors["model.layers.1.mlp.down_proj.weight"]
    wanted = quantized.linear("model.layers.1.mlp.down_proj").codes.numpy()
    np.testing.assert_array_equal(words.view(np.uint8), wanted)
    assert told.tasks == [("write MLX", 16)] and told.notes == list(quantized.linears)
    roles = {file.path.removeprefix("model/"): file.role for file in made.files if file.path.startswith("model/")}
    assert roles == {"model.safetensors": "model", "config.json": "runner", "README.md": "runner"}


def test_longropes_are_laid_out_for_the_context_and_other_ropes_as_trained() -> None:
    sound = lowering.quantized(tokenizer=False)

    def trained(scaling: RopeScaling, context: int) -> int:
        config = replace(sound.config, rope_scaling=scaling, max_position_embeddings=32)
        return settings(replace(sound, config=config), context)["rope_scaling"]["original_max_position_embeddings"]

    mixed = RopeScaling("ntkmixed", 4.0, power=0.25)
    assert [trained(mixed, context) for context in (16, 64)] == [32, 64]
    llama = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
    assert trained(llama, 64) == 24


def test_a_card_tells_what_is_known() -> None:
    assert model_card({}) == '---\nlibrary_name: "mlx"\n---\n\n# model\n'
    assert model_card({"name": "蓝心"}).endswith("\n# 蓝心\n")


def test_a_model_that_mlx_computes_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(quantized: QuantizedCheckpoint) -> str:
        with pytest.raises(TargetError) as error:
            export(quantized, tmp_path / "a")
        assert not (tmp_path / "a").exists()
        return error.value.problem

    sound = lowering.quantized(tokenizer=False)
    scaled = replace(sound.config, rope_scaling=RopeScaling("dynamic", 2.0))
    assert "dynamic rope" in refused(replace(sound, config=scaled))
    assert "turns 8 of 16 dimensions" in refused(replace(sound, config=replace(sound.config, rotary_dim=8)))
    monkeypatch.setattr(QuantizedCheckpoint, "vector", lambda *_: torch.full((64,), 1e5))
    assert refused(sound) == "values beyond float16"
