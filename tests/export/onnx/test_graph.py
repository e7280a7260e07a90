"""Graphs and their weight file as they are written: where numbers lie, that equal input gives equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.onnx.graph import INLINE_BYTES, NoFile, OnnxGraph, WeightFile

SMALL = np.arange(INLINE_BYTES // 4, dtype=np.float32)
LARGE = np.arange(INLINE_BYTES // 4 + 1, dtype=np.float32)
OPSETS = {"": 21, "com.microsoft": 1, "another.domain": 3}


def built(weights: WeightFile) -> OnnxGraph:
    graph = OnnxGraph("tested", weights)
    graph.input("x", TensorProto.FLOAT, [1, "n"])
    for name, array in (("small", SMALL), ("first", LARGE), ("second", LARGE + 1), ("third", LARGE + 2)):
        graph.initializer(name, array)
    graph.node("Concat", ["x", "small", "first", "second", "third"], "y", axis=0)
    graph.output("y", TensorProto.FLOAT, ["n"])
    return graph


def saved(folder: Path) -> Path:
    folder.mkdir()
    with WeightFile(folder / "weights.bin") as weights:
        built(weights).save(folder / "model.onnx", OPSETS, 10)
    return folder / "model.onnx"


def test_numbers_come_back_and_lie_on_whole_cache_lines(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    held = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    outside = {name: {e.key: e.value for e in tensor.external_data} for name, tensor in held.items()}
    assert held["small"].data_location == TensorProto.DEFAULT and not outside["small"]
    places = [int(outside[name]["offset"]) for name in ("first", "second", "third")]
    assert places == [0, 320, 640]  # 260 bytes each, at multiples of 64
    assert [int(outside[name]["length"]) for name in ("first", "second", "third")] == [260] * 3
    assert (path.parent / "weights.bin").stat().st_size == 900
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for name, wanted in (("small", SMALL), ("first", LARGE), ("second", LARGE + 1), ("third", LARGE + 2)):
        assert np.array_equal(found[name], wanted), name


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = (saved(tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == two


def test_a_graph_may_be_known_without_a_file(tmp_path: Path) -> None:
    with NoFile(tmp_path / "weights.bin") as nowhere:
        model = built(nowhere).model(OPSETS, 10)
    assert [len(model.graph.node), len(model.graph.initializer)] == [1, 4]
    assert nowhere.tensors["third"].length == 260 and not (tmp_path / "weights.bin").exists()
    assert {opset.domain: opset.version for opset in model.opset_import} == OPSETS and model.ir_version == 10
