"""Quantized Hugging Face checkpoints: every layout read to the value it means, and kept by what we write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError, TargetError
from compress.formats.adopt import adopt, given_recipe, scattered
from compress.formats.gptq import Gptq
from compress.formats.layout import MatrixShape, make_weight
from compress.formats.packed import PackedCheckpoint, open_weights
from compress.recipe import Recipe
from export.onnx import cpu as onnx_cpu
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from tests.support.checkpoints.packed import AWQ, CT, V1, V2, Drawn, awq, compressed, draw, gptq, scheme, write_packed

Pack = Callable[[Drawn], dict[str, Tensor]]
LAYOUTS: dict[str, tuple[Pack, dict[str, Any] | None, dict[str, Any]]] = {
    "gptq v1": (gptq, V1, {}),
    "gptq v1, no g_idx": (lambda d: gptq(d, g_idx=False), V1, {}),
    "gptq v1, symmetric": (gptq, V1, {"symmetric": True}),
    "gptq v1, 8 bits": (gptq, V1 | {"bits": 8}, {"bits": 8}),
    "gptq v1, act-order": (gptq, V1 | {"desc_act": True}, {"scattered": True}),
    "gptq v2": (lambda d: gptq(d, version=2), V2, {"lowest_zero": 0}),
    "gptq v2, 8 bits": (lambda d: gptq(d, version=2), V2 | {"bits": 8}, {"lowest_zero": 0, "bits": 8}),
    "gptq, one scale a row": (gptq, V1 | {"group_size": -1}, {"group": 64, "symmetric": True}),
    "gptq, float32 scales": (gptq, V1, {"dtype": torch.float32}),
    "GPTQ-for-LLaMa": (lambda d: gptq(d, g_idx=False), None, {}),
    "awq": (awq, AWQ, {"lowest_zero": 0}),
    "compressed-tensors": (compressed, CT, {"lowest_zero": 0}),
    "compressed-tensors, bfloat16": (compressed, CT, {"lowest_zero": 0, "dtype": torch.bfloat16}),
    "compressed-tensors, symmetric": (
        lambda d: compressed(d, symmetric=True),
        scheme(symmetric=True),
        {"symmetric": True},
    ),
    "compressed-tensors, act-order": (compressed, CT, {"scattered": True}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_are_what_the_format_defines(name: str, tmp_path: Path) -> None:
    pack, settings, linear = LAYOUTS[name]
    linear = {"group": 16, **linear}
    shape = {"inner": 64, "layers": 1} if linear["group"] == 64 else {"layers": 1}
    drawn = write_packed(tmp_path / "m", pack, settings, shape=shape, **linear)
    found = open_weights(tmp_path / "m")
    assert isinstance(found, PackedCheckpoint)
    assert found.survey.keys() == drawn.keys()
    for stem, wanted in drawn.items():
        weight = found.linear(stem)
        assert weight is not None
        assert torch.equal(weight.dequantize(), wanted.values), stem
        order = np.arange(wanted.codes.shape[1]) if weight.order is None else weight.order.numpy()
        assert np.array_equal(weight.weight.codes.numpy(), wanted.codes[:, order]), "a code was changed"
    block = found.block(0)
    assert torch.equal(block["mlp.up_proj.weight"], drawn["model.layers.0.mlp.up_proj"].values)
    assert found.head().shape == (512, 64)


@pytest.mark.parametrize("name", ["gptq v1", "gptq v1, act-order", "gptq, float32 scales", "awq", "compressed-tensors"])
def test_codes_go_into_our_checkpoint_and_the_artifact_untouched(name: str, tmp_path: Path) -> None:
    pack, settings, linear = LAYOUTS[name]
    drawn = write_packed(tmp_path / "m", pack, settings, group=16, **linear)
    packed = PackedCheckpoint.open(tmp_path / "m")
    recipe = given_recipe(packed, Recipe())
    assert (recipe.method, recipe.bits, recipe.group_size, recipe.symmetric) == ("given", 4, 16, False)
    ours = adopt(packed, recipe, tmp_path / "q")
    down = "model.layers.1.mlp.down_proj"
    kept = ours.linear(down)
    columns = drawn[down].codes if name != "gptq v1, act-order" else drawn[down].codes[:, sorted_by_group(drawn[down])]
    assert np.array_equal(kept.codes.numpy(), columns)
    assert torch.equal(kept.scales.float(), drawn[down].scales.float())
    if "act-order" not in name:
        for index in range(2):
            for local, tensor in packed.block(index).items():
                assert torch.equal(tensor, ours.block(index)[local]), local
    artifact = onnx_cpu.export(ours, tmp_path / "a", context=16, chunk=8)
    tokens = [1, 20, 30, 40, 50, 60]
    wanted = TorchRuntime(packed, 16).logits(tokens)
    with open_runtime(artifact.folder) as runtime:
        found = runtime.logits(tokens)
    # the head and the embedding were float and have 8 bits now: a difference, but a small one
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()
    exact = TorchRuntime(ours, 16).logits(tokens)
    assert np.abs(found - exact).max() < 1e-4


def sorted_by_group(linear: Drawn) -> np.ndarray:
    return np.argsort(linear.groups, kind="stable")


def test_scattered_groups_are_folded_where_that_is_exact_and_refused_where_no_runtime_can(tmp_path: Path) -> None:
    pack, settings, linear = LAYOUTS["gptq v1, act-order"]
    write_packed(tmp_path / "m", pack, settings, **linear)
    packed = PackedCheckpoint.open(tmp_path / "m")
    assert "model.layers.0.mlp.down_proj" not in scattered(packed)
    assert "model.layers.0.self_attn.q_proj" in scattered(packed)
    ours = adopt(packed, given_recipe(packed, Recipe()), tmp_path / "q")
    theirs, here = packed.block(0), ours.block(0)
    x = torch.randn(5, 64, dtype=torch.float64)

    def mlp(block: dict[str, Tensor]) -> Tensor:
        gate, up, down = (block[f"mlp.{part}_proj.weight"].double() for part in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    assert torch.allclose(mlp(theirs), mlp(here), rtol=1e-12, atol=1e-14)
    assert not torch.equal(theirs["mlp.down_proj.weight"], here["mlp.down_proj.weight"])
    assert torch.equal(theirs["self_attn.q_proj.weight"], here["self_attn.q_proj.weight"])
    with pytest.raises(TargetError, match="another order"):
        ours.linear("model.layers.0.self_attn.q_proj")


def test_zero_points_of_0_in_version_1(tmp_path: Path) -> None:
    """GPTQModel subtracts 1 from all fields of a word at once; nobody else's -1 is known to mean 0."""
    linear = draw(16, 32, lowest_zero=0, seed=3)
    assert (linear.zeros == 0).any()
    version_2 = gptq(linear, version=2)
    whole = version_2["qzeros"].long() - int("0x11111111", 16)
    parts = version_2 | {"qzeros": ((whole + 2**31) % 2**32 - 2**31).to(torch.int32)}
    read = Gptq("", 1, borrows=True).read(MatrixShape(16, 32), parts)
    assert torch.equal(read.dequantize(), linear.values)
    with pytest.raises(InputError, match="stored as -1"):
        Gptq("", 1).read(MatrixShape(16, 32), parts)


@given(
    bits=st.sampled_from([4, 8]),
    signs=st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=6, max_size=6),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_negative_and_zero_scales_keep_their_values(bits: int, signs: list[float], symmetric: bool, seed: int) -> None:
    linear = draw(2, 24, bits=bits, group=8, symmetric=symmetric, lowest_zero=0, seed=seed)
    scales = linear.scales * torch.tensor(signs).view(2, 3).half()
    codes, zeros = torch.from_numpy(linear.codes).to(torch.uint8), torch.from_numpy(linear.zeros).to(torch.uint8)
    weight = make_weight(codes.T.contiguous().T, scales.T.contiguous().T, zeros, bits)  # as GPTQ's tensors lie
    assert (weight.scales > 0).all()
    wanted = (linear.codes - linear.zeros[:, linear.groups]) * scales.double().numpy()[:, linear.groups]
    assert np.array_equal(weight.dequantize().numpy(), wanted.astype(np.float32))


def test_linears_that_stay_float_get_8_bits(tmp_path: Path) -> None:
    write_packed(tmp_path / "m", awq, AWQ, kept=("self_attn.v_proj",), shape={"layers": 1})
    packed = PackedCheckpoint.open(tmp_path / "m")
    ours = adopt(packed, given_recipe(packed, Recipe()), tmp_path / "q")
    value = ours.linear("model.layers.0.self_attn.v_proj")
    assert (value.bits, value.group_size) == (8, -1)
    exact = packed.block(0)["self_attn.v_proj.weight"]
    assert (value.dequantize() - exact).abs().max() < exact.abs().max() / 100
    assert ours.info["layers"]["model.layers.0.self_attn.v_proj"]["given"] == "float"


def test_other_architectures_and_early_files(tmp_path: Path) -> None:
    """Biases of Qwen2 are its own; zero biases of early quantizers are dropped; AutoGPTQ's old file names."""
    shape = {"architecture": "Qwen2ForCausalLM", "layers": 1, "layer_norm": False}
    drawn = write_packed(tmp_path / "m", gptq, None, shape=shape)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(128)
    save_file(tensors, tmp_path / "m" / "gptq_model-4bit-16g.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16}))
    packed = open_weights(tmp_path / "m")
    assert isinstance(packed, PackedCheckpoint)
    ours = adopt(packed, given_recipe(packed, Recipe()), tmp_path / "q")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(ours.linear(name).dequantize(), drawn[name].values)
    assert torch.equal(ours.vector(f"{name}.bias"), tensors[f"{name}.bias"].float())


def test_fused_and_interleaved_linears_are_cut_row_by_row(tmp_path: Path) -> None:
    """ChatGLM: q, k and v in one linear, rotary pairs side by side. What Checkpoint does to float rows."""
    from bluelm.checkpoint import file_shapes
    from bluelm.config import ModelConfig
    from tests.support.checkpoints.shapes import config_dict

    names = {
        "padded_vocab_size": 512,
        "ffn_hidden_size": 64,
        "num_layers": 1,
        "multi_query_group_num": 2,
        "kv_channels": 16,
        "layernorm_epsilon": 1e-5,
        "seq_length": 128,
        "rmsnorm": True,
        "post_layer_norm": True,
        "multi_query_attention": True,
        "original_rope": True,
        "add_qkv_bias": True,
    }
    data = config_dict(architecture="ChatGLMModel", **names) | {"model_type": "chatglm"}
    for folder in ("float", "packed"):
        (tmp_path / folder).mkdir()
        extra = {} if folder == "float" else {"quantization_config": V1}
        (tmp_path / folder / "config.json").write_text(json.dumps(data | extra))
    plain: dict[str, Tensor] = {}
    quantized: dict[str, Tensor] = {}
    for seed, (name, size) in enumerate(file_shapes(ModelConfig.from_dict(data)).items()):
        if len(size) == 2 and ("attention" in name or "mlp" in name):
            linear = draw(*size, seed=seed)
            plain[name] = linear.values
            stem = name.removesuffix(".weight")
            quantized |= {f"{stem}.{local}": part for local, part in gptq(linear).items()}
        else:
            plain[name] = quantized[name] = torch.randn(size)
    save_file(plain, tmp_path / "float" / "model.safetensors")
    save_file(quantized, tmp_path / "packed" / "model.safetensors")
    wanted, found = Checkpoint.open(tmp_path / "float"), open_weights(tmp_path / "packed")
    for local, tensor in wanted.block(0).items():
        assert torch.equal(found.block(0)[local], tensor), local
