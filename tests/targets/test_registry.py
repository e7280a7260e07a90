"""Targets and chips by name, and what they refuse before any work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from compress.recipe import Recipe
from export.lowering.parts import split
from targets.qualcomm.backend import part_limit
from targets.registry import find, targets
from targets.socs import table
from tests.support.checkpoints.shapes import config_dict

BLUELM_7B = ModelConfig.from_dict(
    config_dict(layers=32, hidden=4096, inner=11008, heads=32, kv_heads=None, vocab=100096)
    | {"max_position_embeddings": 2048}
)


def recipe(**values: object) -> Recipe:
    return Recipe.make({"method": "rtn", **values})


def test_snapdragons() -> None:
    """Numbers of Qualcomm's QNN headers."""
    expected = {"sm8550": (43, 73), "sm8650": (57, 75), "sm8750": (69, 79), "SM8850": (87, 81)}
    for name, (model, arch) in expected.items():
        soc = find("snapdragon", name).soc
        assert (soc.qnn_soc_model, soc.hexagon_arch) == (model, arch)
    assert find("snapdragon").soc.id == "SM8650"
    assert find("snapdragon").runtime == "qnn-context" and find("snapdragon").default_on == "htp"
    assert find("snapdragon-8-elite").soc.id == "SM8750"
    assert find("sm8550").name == "snapdragon"
    assert find("snapdragon", runtime="onnx-cpu").default_on == "cpu"
    assert find("generic-arm64").runtime == "onnx-genai"
    assert find("snapdragon", runtime="gguf").runtime == "gguf"
    assert not find("generic-arm64").needs_ranges and find("snapdragon").needs_ranges


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        find("snapdragom")
    assert "snapdragon" in str(caught.value.fix) and "generic-arm64" in str(caught.value.fix)
    with pytest.raises(InputError) as caught:
        find("snapdragon", "sm9999")
    assert "sm8650" in str(caught.value.fix) and caught.value.exit_code == 2
    with pytest.raises(InputError, match="no runtime"):
        find("snapdragon", runtime="tensorrt")


def test_every_row_of_the_table_is_reachable() -> None:
    assert {target.name for target in targets()} == set(table().targets)
    names = [name.lower() for soc in table().socs for name in (soc.id, *soc.aliases)]
    assert len(names) == len(set(names))


def test_asymmetric_weights_are_refused_on_the_npu() -> None:
    config = replace(BLUELM_7B, num_layers=2)
    with pytest.raises(TargetError, match="asymmetric") as caught:
        find("snapdragon").check(config, recipe(symmetric=False))
    assert "--symmetric" in str(caught.value.fix) and caught.value.exit_code == 4
    find("generic-arm64").check(config, recipe(symmetric=False))
    find("snapdragon").check(config, recipe())


def test_groups_that_do_not_divide() -> None:
    config = replace(BLUELM_7B, num_layers=1, intermediate_size=11040)
    for name in ("snapdragon", "generic-arm64"):
        with pytest.raises(TargetError, match=r"groups of 128 .* the 11040 inputs of mlp\.down_proj") as caught:
            find(name).check(config, recipe(group_size=128))
        assert caught.value.fix == "use --group-size 32 or -1"


def test_a_7b_is_cut_into_parts_that_a_binary_holds() -> None:
    find("snapdragon").check(BLUELM_7B, recipe())
    # a block: 4*4096**2 + 3*4096*11008 = 202,375,168 weights at 0.5 + 4/32 bytes; the head 100096*4096
    block, head = 202_375_168 * 5 // 8, 100_096 * 4096
    parts = split(0, [block] * 32, head, part_limit(find("snapdragon").soc))
    assert [len(part.layers) for part in parts] == [8, 8, 8, 8, 0]


@pytest.mark.parametrize(("context", "chunk"), [(64, 128), (4096, 128), (1, 1), (512, 0)])
def test_lengths_that_make_no_sense(context: int, chunk: int) -> None:
    with pytest.raises(InputError):
        find("snapdragon").check(replace(BLUELM_7B, num_layers=1), recipe(), context, chunk)
