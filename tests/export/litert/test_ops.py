"""Each LiteRT operation that the decoder is made of, run by LiteRT's interpreter and held against float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated
from ai_edge_litert.interpreter import Interpreter

from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.grid import choose_grid
from export.litert.file import LitertModel
from export.litert.ops import LitertOps, Symbol
from export.lowering.encoding import Encoding
from tests.support.arrays import numbers, softmax

schema: Any = schema_py_generated
Type = schema.TensorType
EPSILON = 0.5
VERSIONS = {
    "FULLY_CONNECTED": 13, "MEAN": 2, "GATHER": 2, "DEQUANTIZE": 3, "CAST": 4, "QUANTIZE": 1, "ADD": 1, "MUL": 1,
    "RSQRT": 1, "BATCH_MATMUL": 1, "SOFTMAX": 1, "LOGISTIC": 1, "RESHAPE": 1, "TRANSPOSE": 1, "SLICE": 1,
    "CONCATENATION": 1,
}  # fmt: skip
"""As LiteRT's own converter numbers operators of these types and options."""
OPERATORS = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
Made = Callable[[LitertOps, dict[str, Symbol]], Symbol]


def rounded(bits: int, group: int) -> QuantizedTensor:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    return choose_grid(values, bits, group, True).nearest(values)


WEIGHTS = {"w4": rounded(4, 32), "w8": rounded(8, -1)}
GAMMA = torch.linspace(0.5, 2.0, 64)


class Graph:
    """One signature with the given inputs, and what `made` makes of them."""

    def __init__(self, folder: Path, made: Made, inputs: dict[str, np.ndarray], cache: int = Type.FLOAT32) -> None:
        model = LitertModel("")
        graph = model.subgraph("main")
        encodings = {"layers.0.keys": Encoding(0.25, 0, "int8")}
        ops = LitertOps(graph, WEIGHTS.__getitem__, {"norm": GAMMA}.__getitem__, EPSILON, cache, encodings.__getitem__)
        kinds = {np.dtype(np.float32): Type.FLOAT32, np.dtype(np.int32): Type.INT32}
        given = {name: ops.input(name, x.shape, kinds[x.dtype]) for name, x in inputs.items() if name != "cache"}
        if "cache" in inputs:
            given["cache"] = ops.cache_input("cache", inputs["cache"].shape, "layers.0.keys")
        self.out = made(ops, given)
        places = {name: symbol.index for name, symbol in given.items()}
        model.signature("main", graph, places, {"out": self.out.index})
        model.save(folder / "a.tflite")
        self.tables: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAs((folder / "a.tflite").read_bytes()))
        runner: Any = Interpreter(model_path=str(folder / "a.tflite")).get_signature_runner("main")
        self.found: np.ndarray = runner(**inputs)["out"]
        self.names = [tensor.name.decode() for tensor in self.tables.subgraphs[0].tensors]
        assert self.found.shape == self.out.shape
        for code in self.tables.operatorCodes:
            assert code.version == VERSIONS[OPERATORS[code.builtinCode]]

    def options(self) -> Any:
        return self.tables.subgraphs[0].operators[-1].builtinOptions


X, Y = numbers(1, 2, 3, 4), numbers(1, 2, 4, 5, seed=1)
MASK = np.where(np.arange(4) < 2, 0, -1e4).astype(np.float32).reshape(1, 1, 1, 4)
ROWS = np.array([4, 0, 2], np.int32)
TABLE = numbers(5, 4)
CASES: dict[str, tuple[Made, dict[str, np.ndarray], np.ndarray]] = {
    "add": (lambda ops, x: ops.add(x["x"], x["m"], "n"), {"x": X, "m": MASK}, X.astype(np.float64) + MASK),
    "multiply": (lambda ops, x: ops.multiply(x["m"], x["x"], "n"), {"x": X, "m": MASK}, X * MASK.astype(np.float64)),
    "scale": (lambda ops, x: ops.scale(x["x"], 0.3, "n"), {"x": X}, X * 0.3),
    "matmul": (lambda ops, x: ops.matmul(x["x"], x["y"], "n"), {"x": X, "y": Y}, X.astype(np.float64) @ Y),
    "masked_softmax": (
        lambda ops, x: ops.masked_softmax(x["x"], x["m"], "n"), {"x": X, "m": MASK}, softmax(X + MASK)
    ),
    "silu": (lambda ops, x: ops.silu(x["x"], "n"), {"x": X}, X / (1 + np.exp(-X.astype(np.float64)))),
    "gather": (lambda ops, x: ops.gather(ops.constant(TABLE, "t"), x["r"], "n"), {"r": ROWS}, TABLE[ROWS]),
    "vector": (lambda ops, x: ops.add(ops.vector("norm"), x["x"], "n"), {"x": X[..., :1]}, X[..., :1] + GAMMA.numpy()),
    "reshape": (lambda ops, x: ops.reshape(x["x"], (1, 3, 8)), {"x": X}, X.reshape(1, 3, 8)),
    "transpose": (lambda ops, x: ops.transpose(x["x"], (0, 3, 1, 2)), {"x": X}, X.transpose(0, 3, 1, 2)),
    "slice": (lambda ops, x: ops.slice(x["x"], 2, 1, 3), {"x": X}, X[:, :, 1:3]),
    "concat": (
        lambda ops, x: ops.concat([x["x"], x["y"]], 2), {"x": X, "y": Y[..., :4]}, np.concatenate([X, Y[..., :4]], 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_its_formula(name: str, tmp_path: Path) -> None:
    made, inputs, wanted = CASES[name]
    np.testing.assert_allclose(Graph(tmp_path, made, inputs).found, wanted, rtol=1e-5, atol=1e-6)


def test_a_norm_divides_by_the_root_of_the_mean_square(tmp_path: Path) -> None:
    x = numbers(1, 3, 64)
    made = Graph(tmp_path, lambda ops, given: ops.rms_norm(given["x"], "norm", "n"), {"x": x})
    shapes = {tensor.name: list(tensor.shape) for tensor in made.tables.subgraphs[0].tensors}
    assert shapes[b"n.mean"] == shapes[b"n.spread"] == [1, 3, 1] and shapes[b"n.unit"] == [1, 3, 64]
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * GAMMA.double().numpy()
    np.testing.assert_allclose(made.found, wanted, rtol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_linear_rounds_its_inputs_alone(weight: str, tmp_path: Path) -> None:
    x = numbers(1, 3, 64) + 2
    made = Graph(tmp_path, lambda ops, given: ops.linear(given["x"], weight, "n"), {"x": x})
    wanted = x.astype(np.float64) @ WEIGHTS[weight].dequantize().double().numpy().T
    steps = np.ptp(np.minimum(x, 0), axis=-1).max() + x.max()  # of one range a token, which holds 0
    assert np.abs(made.found - wanted).max() < steps / 255 * np.abs(WEIGHTS[weight].dequantize().numpy()).sum(1).max()
    assert made.options().keepNumDims is True and made.options().asymmetricQuantizeInputs is True
    assert list(made.tables.subgraphs[0].operators[-1].inputs)[2] == -1  # no bias


def test_names_of_what_only_moves_tell_the_new_part(tmp_path: Path) -> None:
    def made(ops: LitertOps, given: dict[str, Symbol]) -> Symbol:
        return ops.reshape(ops.concat([given["x"], given["y"]], 2), (56,))

    assert Graph(tmp_path, made, {"x": X, "y": Y[..., :4]}).names[2:] == [
        "y/concat0", "integers.56", "y/concat0/reshape1",
    ]  # fmt: skip


HELD = {
    "FLOAT16": (np.array([[0.1, -3.0, 1000.0]], np.float16), np.array([[0.1, -3.0, 1000.0]], np.float16)),
    "INT8": (np.array([[1, -7, 100]], np.int8), np.array([[0.25, -1.75, 25.0]])),
    "FLOAT32": (np.array([[0.1, -3.0]], np.float32), np.array([[0.1, -3.0]], np.float32)),
}


@pytest.mark.parametrize("kind", HELD)
def test_a_cache_is_widened_where_it_is_read(kind: str, tmp_path: Path) -> None:
    stored, wanted = HELD[kind]

    def read(ops: LitertOps, given: dict[str, Symbol]) -> Symbol:
        return ops.read_cache(given["cache"], "wide")

    made = Graph(tmp_path, read, {"cache": stored}, getattr(Type, kind))
    assert made.found.dtype == np.float32 and np.array_equal(made.found, wanted.astype(np.float32))


@pytest.mark.parametrize("kind", HELD)
def test_new_keys_are_rounded_as_the_cache_holds_them(kind: str, tmp_path: Path) -> None:
    x = np.array([[0.3, -0.6, 100.0, 1 / 3]], np.float32)
    codes = np.array([[1, -2, 127, 1]], np.int8)
    stored = {"FLOAT16": x.astype(np.float16), "INT8": codes, "FLOAT32": x}[kind]
    width = getattr(Type, kind)
    (tmp_path / "write").mkdir()
    written = Graph(tmp_path / "write", lambda ops, g: ops.write_cache(g["x"], "n", "layers.0.keys"), {"x": x}, width)
    assert written.found.dtype == stored.dtype and np.array_equal(written.found, stored)
    round_trip = Graph(tmp_path, lambda ops, given: ops.cached(given["x"], "layers.0.keys"), {"x": x}, width)
    assert np.array_equal(round_trip.found, codes * np.float32(0.25) if kind == "INT8" else stored.astype(np.float32))
