"""Folders for other tools: they hold our codes, and transformers computes with our very weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from bluelm.adapters import adapted
from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.formats import write as writing
from compress.formats.adopt import adopt, given_recipe
from compress.formats.packed import PackedCheckpoint
from compress.formats.shards import Shards
from compress.formats.write import Kind, who_cannot_load, write
from compress.recipe import Recipe
from targets.host.torch_runtime import TorchRuntime
from tests.support.checkpoints.packed import CT, V1, V2, compressed, gptq, write_packed
from tests.support.checkpoints.shapes import write_checkpoint

TOKENS = [1, 20, 30, 40, 50, 60, 70]
ROPE = {"type": "ntkmixed", "factor": 16.0, "power": 0.3}


def rounded(
    folder: Path, *, recipe: dict[str, Any] | None = None, **shape: Any
) -> tuple[Checkpoint, QuantizedCheckpoint]:
    """A random float checkpoint, and the same rounded in groups of 32."""
    checkpoint = Checkpoint.open(write_checkpoint(folder / "float", inner=128, dtype=torch.bfloat16, **shape))
    made = Recipe.make({"method": "rtn", **(recipe or {})})
    return checkpoint, quantize(checkpoint, None, made, folder / "codes")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_what_is_written_is_read_back_code_for_code(kind: Kind, symmetric: bool, tmp_path: Path) -> None:
    checkpoint, ours = rounded(tmp_path, recipe={"symmetric": symmetric})
    write(ours, checkpoint, tmp_path / "out", kind)
    found = PackedCheckpoint.open(tmp_path / "out")
    for index in range(2):
        for name in ("self_attn.k_proj", "mlp.down_proj"):
            wanted = ours.linear(f"model.layers.{index}.{name}")
            there = found.linear(f"model.layers.{index}.{name}")
            assert there is not None and there.order is None
            for part in ("codes", "scales", "zeros"):
                assert torch.equal(getattr(there.weight, part), getattr(wanted, part)), part
        assert torch.equal(
            found.block(index)["input_layernorm.weight"], ours.block(index)["input_layernorm.weight"].half()
        )
    if kind == "gptq":
        version = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["checkpoint_format"]
        assert version == ("gptq" if symmetric else "gptq_v2")
    assert torch.equal(found.embedding(), checkpoint.embedding().half().float())
    assert torch.equal(found.head(), checkpoint.head().half().float())


@pytest.mark.parametrize(("kind", "linear"), [("gptq", {"lowest_zero": 0}), ("gptq", {"scattered": True}),
                                              ("gptq", {"bits": 8}),
                                              ("compressed-tensors", {"dtype": torch.float32})])  # fmt: skip
def test_other_tools_codes_pass_through(kind: Kind, linear: dict[str, Any], tmp_path: Path) -> None:
    """From compressed-tensors to GPTQ and back: zero points of 0, scattered groups, 8 bits, float32 scales."""
    pack, settings = (compressed, CT) if kind == "gptq" else (lambda d: gptq(d, version=2), V2)
    bits = linear.get("bits", 4)
    if kind == "gptq":
        weights = CT["config_groups"]["group_0"]["weights"] | {"num_bits": bits}
        settings = CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    drawn = write_packed(tmp_path / "m", pack, settings, **linear)
    packed = PackedCheckpoint.open(tmp_path / "m")
    write(adopt(packed, given_recipe(packed, Recipe()), tmp_path / "codes"), packed, tmp_path / "out", kind)
    found = PackedCheckpoint.open(tmp_path / "out")
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"):
        weight = found.linear(name)
        assert weight is not None
        assert torch.equal(weight.dequantize(), drawn[name].values)
    if kind == "gptq":
        version = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["checkpoint_format"]
        assert version == "gptq_v2", "GPTQModel loads no asymmetric version 1 but its own"


def loaded_by_transformers(folder: Path) -> torch.nn.Module:
    """The model that transformers makes of a folder; its logits are ours."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([TOKENS])).logits[0]
    wanted = torch.from_numpy(TorchRuntime(PackedCheckpoint.open(folder), 16).logits(TOKENS))
    assert (logits - wanted).abs().max() < 2e-5 * wanted.abs().max()
    return model


@pytest.mark.parametrize(
    "shape",
    [
        {"rope_scaling": ROPE},
        {"architecture": "Qwen2ForCausalLM", "layer_norm": False, "tied": True},
        {"architecture": "Qwen3ForCausalLM", "layer_norm": False, "head_dim": 32},
    ],
)
def test_transformers_computes_with_our_weights(shape: dict[str, Any], tmp_path: Path) -> None:
    """compressed-tensors on the CPU: every weight bit for bit, then the logits; 32K rope, biases, ties."""
    checkpoint, ours = rounded(tmp_path, **shape)
    write(ours, checkpoint, tmp_path / "out", "compressed-tensors")
    model = loaded_by_transformers(tmp_path / "out")
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    assert len(linears) == 14
    for name, module in linears.items():
        weight = decompressed(dict(module.state_dict()), symmetric=True)
        assert torch.equal(weight, ours.linear(name).dequantize()), name


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_itself_finds_our_asymmetric_weights(bits: int, tmp_path: Path) -> None:
    checkpoint, ours = rounded(tmp_path, recipe={"symmetric": False, "bits": bits})
    write(ours, checkpoint, tmp_path / "out", "compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        parts = {key.removeprefix(f"{name}."): part for key, part in tensors.items() if key.startswith(f"{name}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        weight = decompressed(parts, symmetric=False, bits=bits)
        assert torch.equal(weight, ours.linear(name).dequantize()), name


def decompressed(parts: dict[str, torch.Tensor], *, symmetric: bool, bits: int = 4) -> torch.Tensor:
    """The float weight of a linear's tensors, by compressed-tensors; it may be float already."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if "weight" in parts:
        return parts["weight"]
    arguments = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": symmetric}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs.model_validate(arguments))
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    weight = compressor.decompress({**parts}, scheme)["weight"]
    assert weight is not None
    return weight


@pytest.mark.parametrize("kind", ["awq", "compressed-tensors"])
def test_scattered_groups_need_gptq(kind: Kind, tmp_path: Path) -> None:
    write_packed(tmp_path / "m", gptq, V1 | {"desc_act": True}, scattered=True, shape={"layers": 1})
    packed = PackedCheckpoint.open(tmp_path / "m")
    ours = adopt(packed, given_recipe(packed, Recipe()), tmp_path / "codes")
    with pytest.raises(InputError, match=f"{kind} cannot hold the scattered groups"):
        write(ours, packed, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_transformers_reads_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint, ours = rounded(tmp_path)
    write(ours, checkpoint, tmp_path / "out", "gptq")
    theirs, tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer.from_folder(tmp_path / "float")
    for text in ("The small model answers.", "你好，世界 2026\n\tx"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True)


def test_several_files_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, ours = rounded(tmp_path)
    monkeypatch.setattr(writing, "Shards", partial(Shards, most=100_000))
    write(ours, checkpoint, tmp_path / "out", "awq")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sum(len(load_file(tmp_path / "out" / file)) for file in files) == 2 * (7 * 3 + 2) + 3
    assert torch.equal(PackedCheckpoint.open(tmp_path / "out").block(1)["mlp.up_proj.weight"],
                       ours.block(1)["mlp.up_proj.weight"])  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "recipe", "shape", "said"),
    [
        ("awq", {"bits": 8}, {}, "no 8-bit codes"),
        ("gptq", {"bits": 3}, {}, "no 3-bit codes"),
        ("gptq", {"group_size": -1}, {"hidden": 36, "heads": 3, "kv_heads": 3}, "no whole 32-bit words"),
    ],
)
def test_what_a_format_cannot_hold(kind: Kind, recipe: dict[str, Any], shape: Any, said: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "float", inner=128, **shape))
    with pytest.raises(InputError, match=said):
        writing.check_recipe(checkpoint.config, Recipe.make({"method": "rtn", **recipe}), kind)


def test_an_adapter_is_in_what_is_written(tmp_path: Path) -> None:
    from tests.support.checkpoints.adapters import CONFIG, write_adapter

    base = Checkpoint.open(write_checkpoint(tmp_path / "base"))
    write_adapter(tmp_path / "a", lora_alpha=40)
    merged = adapted(base, [(tmp_path / "a", 1.0)])
    assert CONFIG["r"] == 4
    ours = quantize(merged, None, Recipe.make({"method": "rtn", "bits": 8}), tmp_path / "codes")
    write(ours, merged, tmp_path / "out", "gptq")
    found = PackedCheckpoint.open(tmp_path / "out").block(0)["self_attn.q_proj.weight"]
    off = (found - merged.block(0)["self_attn.q_proj.weight"]).abs().max()
    assert off < 0.02 < (found - base.block(0)["self_attn.q_proj.weight"]).abs().max()
    assert V1["quant_method"] == "gptq"


MIXED = {"layers": {f"model.layers.{index}.mlp.down_proj": {"bits": 8, "group_size": -1} for index in (0, 1)}}


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("gptq", {"rotate": True}),
        ("awq", {"rotate": True}),
        ("compressed-tensors", {"rotate": True}),
        ("gptq", MIXED),
        ("compressed-tensors", {"rotate": True, **MIXED}),
    ],
)
def test_rotated_and_mixed_widths_are_the_same_model(kind: Kind, recipe: dict[str, Any], tmp_path: Path) -> None:
    """The folder answers as the float model does, up to rounding; codes at their own widths."""
    checkpoint, ours = rounded(tmp_path, recipe=recipe)
    write(ours, checkpoint, tmp_path / "out", kind)
    found = PackedCheckpoint.open(tmp_path / "out")
    for name, info in ours.linears.items():
        if ".layers." in name:
            there = found.linear(name)
            assert there is not None and (there.weight.bits, there.weight.group_size) == (info.bits, info.group_size)
            assert torch.equal(there.weight.codes, ours.linear(name).codes)
    exact = TorchRuntime(checkpoint, 16).logits(TOKENS)
    plain = TorchRuntime(quantize(checkpoint, None, Recipe.make({"method": "rtn"}), tmp_path / "plain"), 16)
    error = abs(TorchRuntime(found, 16).logits(TOKENS) - exact).mean()
    assert error < 1.5 * abs(plain.logits(TOKENS) - exact).mean() < 0.5 * abs(exact).mean()
    assert (who_cannot_load(ours, kind) is None) == ("layers" not in recipe or kind == "compressed-tensors")


def test_transformers_computes_with_rotated_weights_of_several_widths(tmp_path: Path) -> None:
    checkpoint, ours = rounded(tmp_path, recipe={"rotate": True, **MIXED})
    write(ours, checkpoint, tmp_path / "out", "compressed-tensors")
    loaded_by_transformers(tmp_path / "out")


def test_what_vllm_fuses_is_told_where_widths_differ(tmp_path: Path) -> None:
    layers = {"model.layers.1.self_attn.k_proj": {"bits": 8, "group_size": 32}}
    _, ours = rounded(tmp_path, recipe={"layers": layers})
    said = who_cannot_load(ours, "gptq")
    assert said is not None and "vLLM fuses q_proj, k_proj, v_proj, which differ in block 1" in said
    assert "transformers reads one width" in said
