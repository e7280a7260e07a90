"""A quantized folder's words against its tensors: read as both say, or refused with what each of them says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bluelm.errors import InputError
from compress.formats.adopt import adopt, given_recipe
from compress.formats.claims import Claim, read_claims
from compress.formats.packed import PackedCheckpoint
from compress.recipe import Recipe
from tests.support.checkpoints.packed import AWQ, V1, V2, Drawn, awq, compressed, gptq, scheme, write_packed

Pack = Callable[[Drawn], dict[str, Tensor]]
Q = "model.layers.0.self_attn.q_proj"


def v2(linear: Drawn) -> dict[str, Tensor]:
    return gptq(linear, version=2)


def shifted(zero: int, version: int = 1) -> Pack:
    """GPTQ whose zero points are all stored as if `zero` were meant."""
    return lambda linear: gptq(replace(linear, zeros=np.full_like(linear.zeros, zero)), version=version)


def without(part: str, pack: Pack) -> Pack:
    return lambda linear: {name: tensor for name, tensor in pack(linear).items() if name != part}


def with_idle_index(linear: Drawn) -> dict[str, Tensor]:
    parts = gptq(linear)
    return parts | {"g_idx": torch.zeros_like(parts["g_idx"])}


def opened(folder: Path, pack: Pack, settings: dict[str, Any], **linear: Any) -> tuple[PackedCheckpoint, Any]:
    drawn = write_packed(folder, pack, settings, shape={"layers": 1}, **linear)
    found = PackedCheckpoint.open(folder)
    given_recipe(found, Recipe())  # what a run does before any work
    return found, drawn


SYMMETRIC = {"symmetric": True}
READ: dict[str, tuple[Pack, dict[str, Any], dict[str, Any]]] = {
    "sym, stored 7 in version 1": (gptq, V1 | {"sym": True}, SYMMETRIC),
    "sym, stored 8 in version 2": (v2, V2 | {"sym": True}, SYMMETRIC),
    "sym, stored 8 under version 1's name": (v2, V1 | {"sym": True}, SYMMETRIC),
    "sym, stored 7 under version 2's name": (gptq, V2 | {"sym": True}, SYMMETRIC),
    "sym, 8 bits, stored 128 under version 1's name": (v2, V1 | {"sym": True, "bits": 8}, SYMMETRIC | {"bits": 8}),
    "not sym": (gptq, V1 | {"sym": False}, {}),
    "desc_act with static groups, no g_idx": (
        without("g_idx", gptq), V1 | {"desc_act": True, "static_groups": True}, {},
    ),
    "desc_act, one group, no g_idx": (
        without("g_idx", gptq), V1 | {"desc_act": True, "group_size": -1}, {"group": 64, "inner": 64},
    ),
    "dynamic": (gptq, V1 | {"bits": 8, "dynamic": {r"+:model\.layers\.0\..*": {"bits": 4}}}, {}),
    "dynamic, first rule": (gptq, V1 | {"bits": 8, "dynamic": {".*proj": {"bits": 4}, ".*": {"bits": 2}}}, {}),
    "auto-round": (gptq, {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False}, {}),
    "awq": (awq, AWQ | {"zero_point": False}, SYMMETRIC),
    "compressed-tensors by name": (
        compressed,
        scheme() | {"config_groups": {
            "a": {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": 32, "symmetric": True}},
            "b": {"targets": [r"re:.*layers\.0\..*"], "weights": {"num_bits": 4, "group_size": 16}},
        }},
        {"lowest_zero": 0},
    ),
    "compressed-tensors, static order": (compressed, scheme(actorder="static"), {"lowest_zero": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_agrees_is_read(name: str, tmp_path: Path) -> None:
    pack, settings, linear = READ[name]
    linear = dict(linear)
    inner = linear.pop("inner", 128)
    drawn = write_packed(tmp_path / "m", pack, settings, shape={"layers": 1, "inner": inner}, **{"group": 16, **linear})
    found = PackedCheckpoint.open(tmp_path / "m")
    given_recipe(found, Recipe())
    for stem, wanted in drawn.items():
        weight = found.linear(stem)
        assert weight is not None
        assert torch.equal(weight.dequantize(), wanted.values), stem


REFUSED: dict[str, tuple[Pack, dict[str, Any], dict[str, Any], list[str]]] = {
    "sym, stored 0": (shifted(1), V1 | {"sym": True}, {}, ["stored as 0", "1 in the format gptq and 0 in gptq_v2"]),
    "sym, stored 9": (shifted(9, 2), V2 | {"sym": True}, {}, ["stored as 9", "10 in the format gptq and 9 in gptq_v2"]),
    "sym, many": (gptq, V1 | {"sym": True}, {}, ["sym is true", "a symmetric grid has 8"]),
    "not sym, stored 8": (shifted(9), V1 | {"sym": False}, {}, ["below their zero points", "misread"]),
    "nothing said, stored 8": (shifted(9), V1, {}, ["below their zero points", "misread"]),
    "desc_act, no g_idx": (without("g_idx", gptq), V1 | {"desc_act": True}, {}, ["desc_act is true", "no g_idx"]),
    "desc_act, g_idx of zeros": (with_idle_index, V1 | {"desc_act": True}, {}, ["desc_act is true", "all zeros"]),
    "no desc_act, scattered": (gptq, V1, {"scattered": True}, ["desc_act is false", "scatters"]),
    "bits": (gptq, V1 | {"bits": 8}, {}, ["say 8 bits", "have 4"]),
    "bits, the other way": (gptq, V1, {"bits": 8}, ["say 4 bits", "have 8"]),
    "group size": (gptq, V1 | {"group_size": 32}, {}, ["groups of 32", "have 16"]),
    "group size, a row": (gptq, V1 | {"group_size": -1}, {}, ["groups of -1", "have 16"]),
    "group size, AWQ": (awq, AWQ | {"group_size": 32}, {}, ["groups of 32", "have 16"]),
    "AutoAWQ's own names": (
        awq, {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, {},
        ["groups of 64", "have 16"],
    ),
    "AWQ without zero points": (awq, AWQ | {"zero_point": False}, {}, ["say symmetric", "a symmetric grid has 8"]),
    "auto-round": (
        gptq, {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True}, {}, ["sym is true"],
    ),
    "auto-round, one layer": (
        gptq, {"quant_method": "auto-round", "bits": 4, "group_size": 16, "extra_config": {Q: {"bits": 8}}}, {},
        [Q, "say 8 bits"],
    ),
    "dynamic": (gptq, V1 | {"dynamic": {".*q_proj": {"group_size": 64}}}, {}, [Q, "groups of 64", "have 16"]),
    "a pattern without end": (
        gptq, V1 | {"dynamic": {"(([a-z0-9_.]|[a-z0-9_.]+)*)*!": {"bits": 8}, ".*q_proj": {"group_size": 64}}}, {},
        [Q, "groups of 64", "have 16"],
    ),
    "lookaround": (gptq, V1 | {"dynamic": {"(?!x).*": {"bits": 8}}}, {}, ["not a valid pattern", "lookaround"]),
    "a pattern that is none": (gptq, V1 | {"dynamic": {"(": {"bits": 8}}}, {}, ["'('", "not a valid pattern"]),
    "compressed-tensors, bits": (compressed, scheme(num_bits=8), {}, ["say 8 bits", "have 4"]),
    "compressed-tensors, groups": (compressed, scheme(group_size=32), {}, ["groups of 32", "have 16"]),
    "compressed-tensors, a row": (compressed, scheme(strategy="channel"), {}, ["groups of -1", "have 16"]),
    "compressed-tensors, symmetric": (compressed, scheme(symmetric=True), {}, ["say symmetric"]),
    "compressed-tensors, no zero points": (
        without("weight_zero_point", compressed), scheme(), {}, ["say asymmetric", "no weight_zero_point"],
    ),
    "compressed-tensors, order": (compressed, scheme(actorder="group"), {}, ["actorder", "no weight_g_idx"]),
    "words of another kind": (gptq, V1 | {"sym": "yes"}, {}, ["sym must be true or false", "'yes'"]),
    "bits of another kind": (gptq, V1 | {"bits": 4.5}, {}, ["bits must be a whole number", "4.5"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_disagrees_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    pack, settings, linear, said = REFUSED[name]
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "m", pack, settings, **{"group": 16, **linear})
    for words in said:
        assert words in str(caught.value), str(caught.value)
    assert caught.value.where is not None and caught.value.fix is not None


@pytest.mark.parametrize("field", ["bits", "group_size", "sym", "desc_act", "checkpoint_format"])
def test_two_files_of_settings_that_differ_are_refused(field: str, tmp_path: Path) -> None:
    settings = V1 | {"sym": False}
    write_packed(tmp_path / "m", gptq, settings, shape={"layers": 1})
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps(settings))
    PackedCheckpoint.open(tmp_path / "m")
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps(settings | {field: "other"}))
    with pytest.raises(InputError, match=f"{field} is .* 'other' in quantize_config.json"):
        PackedCheckpoint.open(tmp_path / "m")


def test_a_trained_head_beside_a_tied_table_is_kept(tmp_path: Path) -> None:
    """transformers unties such a checkpoint; of codes as of float weights."""
    write_packed(tmp_path / "m", gptq, V1, shape={"layers": 1, "tied": True, "layer_norm": False})
    tied = PackedCheckpoint.open(tmp_path / "m")
    assert tied.config.shares_table and not tied.warnings
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    head = torch.randn_like(tensors["model.embed_tokens.weight"].float()).half()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "m" / "model.safetensors")
    found = PackedCheckpoint.open(tmp_path / "m")
    assert torch.equal(found.head(), head.float()) and "tie_word_embeddings" in found.warnings[0]
    codes = adopt(found, given_recipe(found, Recipe()), tmp_path / "codes")
    assert not codes.config.shares_table
    assert (codes.head() - head.float()).abs().max() < 0.05


def test_the_words_of_compressed_tensors_are_its_own(tmp_path: Path) -> None:
    """compressed-tensors' own matching of schemes to modules: names, expressions, classes."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    groups = {
        "all": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
        "some": {"targets": ["re:.*up"], "weights": {"num_bits": 4, "type": "int", "strategy": "group",
                                                     "group_size": 32, "symmetric": False}},
        "one": {"targets": ["a.up"], "weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64}},
    }  # fmt: skip
    model = torch.nn.ModuleDict()
    for name in "ab":
        model[name] = torch.nn.ModuleDict({local: torch.nn.Linear(64, 64) for local in ("up", "down")})
    apply_quantization_config(model, QuantizationConfig.model_validate({"config_groups": groups}))
    claims = read_claims({"quant_method": "compressed-tensors", "config_groups": groups}, "config.json")
    for name in ("a.up", "a.down", "b.up", "b.down"):
        theirs: Any = model.get_submodule(name).quantization_scheme
        size = theirs.weights.group_size or -1
        ours = claims.of(name)
        assert (ours.bits, ours.group_size) == (theirs.weights.num_bits, size), name
    assert claims.of("b.up") == Claim(4, 32, False, None)
