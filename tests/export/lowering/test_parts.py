"""Models in parts: cut by blocks, each part within its limit, the same logits as the whole, on CPU and NPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bluelm.errors import TargetError
from export.artifacts.artifact import Artifact
from export.artifacts.debug import debug_build
from export.lowering.parts import Part, split
from export.onnx import npu as onnx_npu
from targets.registry import find
from targets.runtime import open_runtime
from tests.packages import requires
from tests.support.checkpoints import lowered as lowering

TOKENS = lowering.tokens(lowering.CHUNK + 3)


def in_parts(folder: Path, limit: int) -> Artifact:
    quantized, ranges = lowering.quantized(), lowering.ranges()
    sizes = lowering.CONTEXT, lowering.CHUNK
    return onnx_npu.export(quantized, ranges, folder, context=sizes[0], chunk=sizes[1], part_bytes=limit)


@pytest.fixture(scope="module")
def blocks_and_head(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Three parts: a block each, and the head."""
    (block, _), head = onnx_npu.weight_sizes(lowering.quantized())
    return in_parts(tmp_path_factory.mktemp("parts") / "artifact", max(block, head))


def test_every_part_has_its_graphs_and_weights(blocks_and_head: Artifact):
    names = [path.name for path in blocks_and_head.paths("decode")]
    assert names == ["decode_1.onnx", "decode_2.onnx", "decode_3.onnx"]
    sizes = [path.stat().st_size for path in blocks_and_head.paths("weights")]
    whole = lowering.npu().path("weights").stat().st_size
    assert len(sizes) == 3 and max(sizes) < whole and sum(sizes) < 1.1 * whole


def test_parts_answer_bit_for_bit_as_the_whole_on_the_cpu(blocks_and_head: Artifact, tmp_path):
    two = in_parts(tmp_path / "two", sum(onnx_npu.weight_sizes(lowering.quantized())[0]))
    assert len(two.paths("prefill")) == 2
    with open_runtime(lowering.npu().folder) as whole:
        expected, after = whole.logits(TOKENS), whole.decode(7)
    for artifact in (blocks_and_head, two):
        with open_runtime(artifact.folder) as cut:
            assert np.array_equal(cut.logits(TOKENS), expected)
            assert np.array_equal(cut.decode(7), after)


@requires("libatomic1")
def test_parts_answer_as_the_whole_on_the_npu(blocks_and_head: Artifact, tmp_path):
    compiled = find("snapdragon").compile(blocks_and_head, tmp_path / "compiled")
    assert len(compiled.paths("context")) == len(compiled.paths("simulator-decode")) == 3
    assert set(compiled.nodes) == {f"{graph}_{part}" for graph in ("prefill", "decode") for part in (1, 2, 3)}
    with open_runtime(lowering.npu().folder, "htp") as whole, open_runtime(compiled.folder, "htp") as cut:
        tokens = TOKENS[: lowering.CHUNK]  # a step on the simulator takes seconds
        assert lowering.mean_kl(whole.logits(tokens), cut.logits(tokens)) < 1e-7
        assert lowering.mean_kl(whole.decode(7)[None], cut.decode(7)[None]) < 1e-7


def test_a_debug_build_shows_the_blocks_of_all_parts(blocks_and_head: Artifact, tmp_path):
    shown = debug_build(blocks_and_head, tmp_path / "parts")
    whole = debug_build(lowering.npu(), tmp_path / "whole")
    with open_runtime(shown.folder) as cut, open_runtime(whole.folder) as one:
        assert np.array_equal(cut.blocks(TOKENS), one.blocks(TOKENS))  # type: ignore[attr-defined]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 9), st.integers(9, 30))
def test_parts_hold_everything_once_within_the_limit(blocks: list[int], head: int, embedding: int, limit: int):
    parts = split(embedding, blocks, head, limit)
    assert [layer for part in parts for layer in part.layers] == list(range(len(blocks)))
    assert [part.heads for part in parts] == [False] * (len(parts) - 1) + [True]
    assert [part.embeds for part in parts] == [True] + [False] * (len(parts) - 1)
    for part in parts:
        size = sum(blocks[layer] for layer in part.layers) + part.embeds * embedding + part.heads * head
        assert size <= limit


def test_what_no_cut_makes_small_enough_is_refused():
    assert split(0, [4, 4], 4, 8) == [Part(True, 0, 2, False), Part(False, 2, 2, True)]
    with pytest.raises(TargetError, match="a block takes 9 bytes"):
        split(0, [4, 9], 4, 8)
    config = replace(lowering.quantized().config, vocab_size=600_000, hidden_size=4096)
    with pytest.raises(TargetError, match=r"the head of .* does not fit one context binary") as caught:
        find("snapdragon").check(config, lowering.quantized().recipe, context=64, chunk=8)
    assert "--target generic-arm64" in str(caught.value.fix) and caught.value.exit_code == 4
