"""MLX's folders: MLX itself reads our numbers from them, and answers as the dequantized model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.mlx.export import biases, check_weight, export, group_of, pack
from export.mlx.reader import MlxFiles, effective
from export.readback import read_back
from targets.apple.mlx import MlxBackend
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from targets.socs import find_soc
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import config_dict, write_checkpoint
from tests.support.damages import copied, metadata, runners

CONTEXT = 64
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama3": {
        "architecture": "LlamaForCausalLM", "layer_norm": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "stretched": {"rope_scaling": {"type": "ntkmixed", "factor": 4.0, "power": 0.25}, "max_position_embeddings": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("mlx") / "quantized", blocks=1, layers=OTHERS)


OTHERS = {
    "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1},
    "model.layers.0.self_attn.o_proj": {"bits": 4, "group_size": 64},
}


@pytest.fixture(scope="module")
def artifact(quantized: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    about = {"name": "A demo", "license": "apache-2.0"}
    return export(quantized, tmp_path_factory.mktemp("mlx") / "a", context=CONTEXT, about=about)


def test_mlx_itself_reads_our_numbers(quantized: QuantizedCheckpoint, artifact: Artifact) -> None:
    folder = artifact.folder / "model"
    tensors, config = mx.load(str(folder / "model.safetensors")), json.loads((folder / "config.json").read_text())
    assert isinstance(tensors, dict)
    for name in quantized.linears:
        group, bits = effective(config, name)
        weight, scales, shifts = (tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        wide = (scales.astype(mx.float32), shifts.astype(mx.float32))
        found = mx.dequantize(weight, *wide, group_size=group, bits=bits)
        assert np.array_equal(np.array(found), quantized.linear(name).dequantize().numpy()), name
    assert effective(config, "model.layers.0.mlp.down_proj")[1] == 8
    assert effective(config, "model.layers.0.self_attn.o_proj") == (64, 4)


def test_it_answers_as_the_dequantized_model(quantized: QuantizedCheckpoint, artifact: Artifact) -> None:
    tokens = np.random.default_rng(0).integers(10, 6000, 24).tolist()
    with open_runtime(artifact.folder) as runtime:
        wanted = TorchRuntime(quantized, CONTEXT).logits(tokens)
        found = runtime.logits(tokens)
        assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
        runtime.rewind(10)
        assert np.allclose(np.stack([runtime.decode(token) for token in tokens[10:]]), found[10:], atol=1e-3)
        with pytest.raises(InputError, match="do not fit a context of 64"):
            runtime.prefill([5] * 65)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_ropes_are_turned_as_the_model_does(shape: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "float", vocab=384, layers=1, **SHAPES[shape])
    held = rounded(tmp_path / "quantized", source=source)
    made = export(held, tmp_path / "a", context=CONTEXT)
    assert not read_back(made, held).wrong
    tokens = list(range(5, 5 + CONTEXT))
    with open_runtime(made.folder) as runtime:
        wanted = TorchRuntime(held, CONTEXT).logits(tokens)
        assert np.abs(runtime.logits(tokens) - wanted).max() < 0.02 * np.abs(wanted).max()


def test_a_stream_beyond_float16_is_no_number(tmp_path: Path) -> None:
    """As Metal stores it."""
    folder = write_checkpoint(tmp_path / "float", vocab=384, layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 5e4
    tensors["model.layers.0.mlp.up_proj.weight"] *= 5e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made = export(rounded(tmp_path / "quantized", source=folder), tmp_path / "a", context=CONTEXT)
    with open_runtime(made.folder) as runtime:
        assert not np.isfinite(runtime.logits([5, 6, 7])).all()


DAMAGES = [row for row in (*metadata.ROWS, *runners.ROWS) if row.formats == ("mlx",)]


def test_what_was_changed_in_the_folder_is_named(
    quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    found = read_back(artifact, quantized)
    assert not found.wrong and not found.untold
    for index, row in enumerate(DAMAGES):
        assert row.files is not None
        hurt = row.files(copied(artifact, tmp_path / str(index)))
        if row.name == "mlx: one end token of two":
            continue  # there is one
        assert read_back(hurt, quantized).wrong, row.name


@pytest.mark.parametrize("part", ["weight", "scales", "biases", "norm", "more"])
def test_a_changed_number_is_named(
    part: str, quantized: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path
) -> None:
    hurt = copied(artifact, tmp_path / "a")
    path, name = hurt.folder / "model" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    if part == "more":
        tensors["model.layers.0.mlp.up_proj.bias"] = mx.zeros(4)
    elif part == "norm":
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.02
    else:
        values = np.array(tensors[f"{name}.{part}"])
        values[3, 1] = values[3, 1] ^ 1 if part == "weight" else values[3, 1] * 2
        tensors[f"{name}.{part}"] = mx.array(values)
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    told = {finding.item: finding.told for finding in read_back(hurt, quantized).wrong}
    wanted = {"weight": "codes", "scales": "scales", "biases": "zero points"}
    if part in wanted:
        assert wanted[part] in told[name] or part == "scales"
    else:
        assert {"norm": "model.norm.weight", "more": "operations"}[part] in told


def test_groups_are_the_widest_that_serve_a_scale_s_columns() -> None:
    assert [group_of(columns) for columns in (32, 64, 96, 128, 576, 1536)] == [32, 64, 32, 128, 64, 128]
    assert group_of(172) is None and group_of(16) is None


def test_what_mlx_cannot_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    def refused(recipe: dict[str, Any], **shape: Any) -> str:
        config = ModelConfig.from_dict(config_dict(**shape))
        with pytest.raises(TargetError) as error:
            MlxBackend().check(find_soc("A18"), config, Recipe.make(recipe), 64, 8)
        return str(error.value)

    assert "scales and zero points" in refused({"symmetric": False})
    assert "a scale here serves 172" in refused({"group_size": -1}, inner=172)
    dynamic = {"type": "dynamic", "factor": 2.0}
    assert "dynamic rope" in refused({}, rope_scaling=dynamic)
    MlxBackend().check(find_soc("A18"), ModelConfig.from_dict(config_dict()), Recipe.make({}), 64, 8)


def test_biases_are_exact() -> None:
    """-scale * zero, in float64."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 64), generator=generator, dtype=torch.uint8)
    scales = torch.rand(8, 2, generator=generator).half() + 1e-3
    weight = QuantizedTensor(codes, scales, torch.full((8, 2), 8, dtype=torch.uint8), 4, 32)
    assert torch.equal(biases(weight).double(), -scales.double() * 8)
    assert check_weight(weight, "w") == 32
    words = pack(weight, "w")["weight"].numpy()
    assert words.dtype == np.uint32 and words.shape == (8, 8)
    assert [int(words[0, 0]) >> 4 * at & 15 for at in range(8)] == codes[0, :8].tolist()


def test_a_damaged_file_is_bad_input(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole = (artifact.folder / "model" / "model.safetensors").read_bytes()
    for data in (b"", b"\0" * 64, whole[:1000], b"\xff" * 8 + whole[8:]):
        path.write_bytes(data)
        with pytest.raises(InputError):
            MlxFiles(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"no model\*\.safetensors"):
        MlxFiles(tmp_path)
