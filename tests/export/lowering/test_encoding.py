"""16-bit encodings and packed codes against arithmetic worked out apart."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from compress.checkpoint.quantized import QuantizedTensor
from export.artifacts.embedding import EmbeddingTable, write_embedding
from export.artifacts.packing import pack, unpack
from export.lowering.encoding import SHARE, Encoding

floats = st.floats(-1e6, 1e6, width=32)


@given(floats, floats, st.sampled_from((8, 16)))
def test_a_range_is_held_within_half_a_step(low: float, high: float, bits: Literal[8, 16]) -> None:
    low, high = min(low, high), max(low, high)
    encoding = Encoding.of_range(low, high, bits)
    x = np.linspace(low, high, 101, dtype=np.float32)
    back = encoding.dequantize(encoding.quantize(x))
    assert np.abs(back - x).max() <= encoding.scale * 0.5 * (1 + 1e-2) + 1e-6 * max(abs(low), abs(high))
    assert encoding.dequantize(encoding.quantize(np.zeros(1, np.float32)))[0] == 0


@pytest.mark.parametrize(
    ("low", "high", "bits", "scale", "zero"),
    [
        (-1, 3, 16, 4 / 65535, 16384),
        (2, 4, 16, 4 / 65535, 0),
        (-3, -1, 16, 3 / 65535, 65535),
        (-1, 3, 8, 4 / 255, 64),
        (0, 0, 8, 1, 0),
        (0.25, 0.5, 8, 0.5 / 255, 0),
        (0, 1e-45, 8, np.finfo(np.float32).tiny, 0),
    ],
)
def test_ranges_as_worked_out_by_hand(low: float, high: float, bits: Literal[8, 16], scale: float, zero: int) -> None:
    found = Encoding.of_range(low, high, bits)
    assert found == Encoding(float(np.float32(scale)), zero, "uint16" if bits == 16 else "uint8")


def test_shares_of_one_are_whole_parts_of_65536() -> None:
    assert SHARE.quantize(np.array([0, 2.0**-16, 0.5, 1], np.float32)).tolist() == [0, 1, 32768, 65535]
    assert SHARE.dequantize(np.array([0, 1, 32768], np.uint16)).tolist() == [0, 2.0**-16, 0.5]


@given(floats, floats)
def test_the_cache_encoding_is_symmetric(low: float, high: float) -> None:
    encoding = Encoding.symmetric(min(low, high), max(low, high))
    assert encoding.zero == 0 and encoding.dtype == "int16"
    reach = max(abs(low), abs(high))
    assert encoding.scale * 32767 >= reach * (1 - 1e-6) or reach == 0
    assert Encoding.symmetric(-3, 2) == Encoding(float(np.float32(3 / 32767)), 0, "int16")
    assert Encoding.symmetric(-3, 4, 8) == Encoding(float(np.float32(4 / 127)), 0, "int8")


@pytest.mark.parametrize(
    "encoding",
    [
        Encoding.of_range(-3.7, 9.1),
        Encoding.symmetric(-3, 2),
        Encoding.of_range(-3.7, 9.1, 8),
        Encoding.symmetric(-3, 2, 8),
        SHARE,
    ],
)
def test_torch_numpy_and_onnx_agree(encoding: Encoding) -> None:
    x = np.random.default_rng(0).normal(0, 5, 1000).astype(np.float32)
    codes = encoding.quantize(x)
    torch_values = encoding.round_trip(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(encoding.dequantize(codes), torch_values)
    found = quantize_by_onnx(x, encoding)
    np.testing.assert_array_equal(found, codes)


def quantize_by_onnx(x: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Codes by onnx's own reference of QuantizeLinear."""
    code_type = helper.np_dtype_to_tensor_dtype(np.dtype(encoding.dtype))
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", code_type, x.shape)],
        [
            onnx.numpy_helper.from_array(np.array(encoding.scale, np.float32), "s"),
            onnx.numpy_helper.from_array(np.array(encoding.zero, encoding.dtype), "z"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    (codes,) = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(codes)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=9))
def test_nibbles_low_half_first(codes: list[int]) -> None:
    array = np.array([codes], np.uint8)
    packed = pack(array, 4)
    expected = [a | b << 4 for a, b in zip(codes[::2], [*codes[1::2], 0], strict=False)]
    assert packed[0].tolist() == expected
    np.testing.assert_array_equal(unpack(packed, 4, len(codes)), array)


@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_rows(bits: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    table = QuantizedTensor(
        torch.randint(2**bits, (20, 10), generator=generator).to(torch.uint8),
        torch.rand(20, 1, generator=generator).half() + 0.01,
        torch.full((20, 1), 2 ** (bits - 1), dtype=torch.uint8),
        bits,
        -1,
    )
    write_embedding(tmp_path / "table", table)
    opened = EmbeddingTable.open(tmp_path / "table")
    assert len(opened) == 20
    np.testing.assert_array_equal(opened.rows([3, 0, 19, 3]), table.dequantize()[[3, 0, 19, 3]].numpy())
