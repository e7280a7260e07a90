"""What the writer of .tflite files puts where: known answers, read with the schema's own classes and plain bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated

from compress.checkpoint.quantized import QuantizedTensor
from export.litert import file
from export.litert.file import LitertModel, Outline

schema: Any = schema_py_generated
Op, Type = schema.BuiltinOperator, schema.TensorType


def weight(bits: int, *rows: list[int], group: int = -1) -> QuantizedTensor:
    """Rows of a few codes, again and again up to 64 columns; scales 0.5, 1, 1.5 ... row by row."""
    codes = torch.tensor([(row * 64)[:64] for row in rows], dtype=torch.uint8)
    groups = 1 if group == -1 else 64 // group
    scales = torch.arange(1, len(rows) * groups + 1).view(len(rows), groups).half() / 2
    zeros = torch.full((len(rows), groups), 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedTensor(codes, scales, zeros, bits, group)


def tables_of(data: bytes) -> Any:
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))


def saved(model: LitertModel, path: Path) -> tuple[Any, bytes]:
    model.save(path)
    data = path.read_bytes()
    return tables_of(data), data


def held(tables: Any, data: bytes, tensor: Any) -> bytes:
    place = tables.buffers[tensor.buffer]
    return data[place.offset : place.offset + place.size]


def test_constants_lie_behind_the_tables_once_and_in_places_of_their_own(tmp_path: Path) -> None:
    odd, turned = np.arange(7, dtype=np.int32) * 3, np.arange(34, dtype=np.float32).reshape(2, 17).T
    model = LitertModel("what it is")
    for name in ("first", "second"):
        graph = model.subgraph(name)
        found = [graph.constant("odd", odd), graph.constant("turned", turned), graph.constant("odd", odd)]
        assert found == [0, 1, 0]
        model.signature(f"call {name}", graph, {"a": 0, "b": 1}, {"c": 1})
    tables, data = saved(model, tmp_path / "a.tflite")
    assert data[4:8] == b"TFL3" and (tables.version, tables.description) == (3, b"what it is")
    assert [graph.name for graph in tables.subgraphs] == [b"first", b"second"]
    assert len(tables.buffers) == 3 and tables.buffers[0].size == 0
    for graph in tables.subgraphs:
        assert [(one.name, list(one.shape), one.type) for one in graph.tensors] == [
            (b"odd", [7], Type.INT32), (b"turned", [17, 2], Type.FLOAT32),
        ]  # fmt: skip
        assert [held(tables, data, one) for one in graph.tensors] == [odd.tobytes(), turned.tobytes()]
        assert all(one.hasRank for one in graph.tensors)
        assert (list(graph.inputs), list(graph.outputs)) == ([0, 1], [1])
    first, second = (place.offset for place in tables.buffers[1:])
    assert first % 64 == 0 and second == first + 64 and len(data) == second + turned.nbytes
    assert data[first - 128 : first].strip(b"\0")  # the tables end there
    assert len(tables.signatureDefs) == 2
    for index, call in enumerate(tables.signatureDefs):
        assert (call.subgraphIndex, call.signatureKey) == (index, [b"call first", b"call second"][index])
        assert [(one.name, one.tensorIndex) for one in call.inputs] == [(b"a", 0), (b"b", 1)]
        assert [(one.name, one.tensorIndex) for one in call.outputs] == [(b"c", 1)]


def test_codes_of_rows_are_signed_bytes_and_of_blocks_signed_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, packed = file.pack, list[int]()
    monkeypatch.setattr(file, "pack", lambda one: (packed.append(one.bits), pack(one))[1])
    rows, blocks = weight(8, [128, 129, 127, 0], [255, 1, 2, 3]), weight(4, [8, 9, 7, 0], [15, 1, 2, 3], group=32)
    model, read = LitertModel(""), list[str]()

    def reading(name: str, one: QuantizedTensor) -> QuantizedTensor:
        read.append(name)
        return one

    for name in ("first", "second"):
        graph = model.subgraph(name)
        for _ in range(2):
            assert graph.weight("rows", lambda: reading("rows", rows)) == 0
            assert graph.weight("blocks", lambda: reading("blocks", blocks)) == 2  # behind its scales
    assert read == ["rows", "blocks", "rows", "blocks"]  # once a graph
    assert packed == [8, 4]  # once a model
    tables, data = saved(model, tmp_path / "a.tflite")
    assert len(tables.buffers) == 4
    for graph in tables.subgraphs:
        eight, scales, four = graph.tensors
        assert [one.name for one in graph.tensors] == [b"rows", b"blocks.scales", b"blocks"]
        assert (eight.type, list(eight.shape)) == (Type.INT8, [2, 64])
        assert (four.type, list(four.shape)) == (Type.INT4, [2, 64])
        assert held(tables, data, eight) == bytes.fromhex("0001ff80" * 16 + "7f818283" * 16)
        assert held(tables, data, four) == bytes.fromhex("108f" * 16 + "97ba" * 16)
        assert held(tables, data, scales) == np.array([[0.5, 1.0], [1.5, 2.0]], np.float16).tobytes()
        assert (scales.type, list(scales.shape)) == (Type.FLOAT16, [2, 2])
        assert eight.quantization.scale.tolist() == [0.5, 1.0] and eight.quantization.zeroPoint.tolist() == [0, 0]
        assert eight.quantization.quantizedDimension == four.quantization.quantizedDimension == 0
        details = four.quantization.details
        assert (details.scales, details.zeroPoints, details.blockSize) == (1, -1, 32)


def test_operators_share_a_code_of_their_version(tmp_path: Path) -> None:
    model = LitertModel("")
    graph = model.subgraph("main")
    for name in ("a", "b"):
        graph.tensor(name, [1])
    options = schema.SoftmaxOptionsT()
    options.beta = 2.0
    graph.operator(Op.BITCAST, [0], [1])  # 159: the field of old readers holds up to 127
    graph.operator(Op.SOFTMAX, [0], [1], options, version=2)
    graph.operator(Op.SOFTMAX, [1], [0], options, version=3)
    graph.operator(Op.SOFTMAX, [1], [0], options, version=2)
    tables, _ = saved(model, tmp_path / "a.tflite")
    codes = [(code.builtinCode, code.deprecatedBuiltinCode, code.version) for code in tables.operatorCodes]
    assert codes == [(159, 127, 1), (25, 25, 2), (25, 25, 3)]
    first, *others = tables.subgraphs[0].operators
    assert first.builtinOptions is None and [one.builtinOptions.beta for one in others] == [2.0, 2.0, 2.0]
    assert [one.opcodeIndex for one in (first, *others)] == [0, 1, 2, 1]
    assert [(list(one.inputs), list(one.outputs)) for one in (first, *others)] == [
        ([0], [1]), ([0], [1]), ([1], [0]), ([1], [0]),
    ]  # fmt: skip


def test_an_outline_has_the_tables_and_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(file, "pack")
    model = Outline("")
    graph = model.subgraph("main")
    assert graph.weight("w", lambda: weight(4, [1], group=32)) == 1 == graph.weight("w", lambda: weight(4, [1]))
    assert graph.constant("c", np.ones(3, np.float32)) == 2
    again = model.subgraph("again")
    assert again.constant("c", np.ones(3, np.float32)) == 0
    tables = model.tables()
    assert [one.buffer for one in tables.subgraphs[0].tensors] == [2, 1, 3]
    assert [one.buffer for one in tables.subgraphs[1].tensors] == [3]
    assert [(place.size, place.data) for place in tables.buffers] == [(0, None)] * 4
