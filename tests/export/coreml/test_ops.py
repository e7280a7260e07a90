"""Each Core ML operation that the decoder is made of: saved, read back, and held against float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.grid import choose_grid
from export.coreml.importing import import_coremltools
from export.coreml.ops import Activations, Constants, MilOps, Slots, WeightForm, fresh_names, identifier, signed_codes
from export.coreml.package import value_type
from export.coreml.save import outline, save_package
from targets.apple.interpreter.interpreter import Interpreter
from tests.support.arrays import numbers, softmax
from tests.support.checkpoints.shapes import config_dict

EPSILON, TOKENS, SLOTS = 0.5, 3, 8
Made = Callable[[MilOps, dict[str, Any]], Any]


def rounded(bits: int, group: int, symmetric: bool) -> QuantizedTensor:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) + (0 if symmetric else 0.4)
    return choose_grid(values, bits, group, symmetric).nearest(values)


WEIGHTS = {f"w{bits}{kind}": rounded(bits, -1 if bits == 8 else 32, not kind) for bits in (4, 8) for kind in ("", "a")}
GAMMA = torch.linspace(0.5, 2.0, 64)
CONFIG = ModelConfig.from_dict(config_dict())


@dataclass
class Source:
    """A checkpoint of a few weights that counts how often one is read."""

    table: QuantizedTensor = WEIGHTS["w8"]
    reads: int = 0
    config: ModelConfig = CONFIG

    def linear(self, name: str) -> QuantizedTensor:
        self.reads += 1
        return WEIGHTS[name]

    def embed(self) -> QuantizedTensor:
        return self.table

    def vector(self, name: str) -> Tensor:
        return {"norm": GAMMA, "w4.bias": GAMMA[:8]}[name]


class Saved:
    """A program of one function, and what it makes of the inputs; `cache` is a state."""

    def __init__(
        self,
        folder: Path,
        made: Made,
        source: Source | None = None,
        wide: bool = True,
        cache: tuple[int, ...] = (1, 2, SLOTS, 4),
        **inputs: np.ndarray,
    ) -> None:
        ct = import_coremltools()
        from coremltools.converters.mil.mil import Builder, Function, Program, types

        mb: Any = Builder
        float_ = types.fp32 if wide else types.fp16
        specs: dict[str, Any] = {"position": mb.TensorSpec((1,), types.int32)}
        for name, x in inputs.items():
            specs[name] = mb.TensorSpec(x.shape, types.int32 if x.dtype == np.int32 else float_)
        specs["cache"] = mb.state_tensor_placeholder(cache, types.fp16)
        kind: Activations = "float32" if wide else "float16"
        self.weights, program = Constants(source or Source(), kind), Program()
        with fresh_names(), Function(specs, ct.target.iOS18) as function:
            given: Any = dict(function.inputs)
            given["cache"] = Slots(given["cache"], cache)
            ops = MilOps(self.weights, EPSILON, given["position"], TOKENS)
            out = made(ops, given)
            function.set_outputs([out])
        program.add_function("main", function)  # type: ignore[reportArgumentType]
        program.default_function_name = "main"  # type: ignore[reportAttributeAccessIssue]
        program.export_as_multifunction = program.skip_all_passes = True  # type: ignore[reportAttributeAccessIssue]
        self.path, self.program = folder / "a.mlpackage", program
        save_package(program, self.weights.providers, {"quantized": "digest"}, self.path)
        self.interpreter = Interpreter(self.path, rounding=False)
        self.state = self.interpreter.make_state()
        self.inputs = {"position": np.zeros(1, np.int32), **inputs}
        self.found = self.run()

    def run(self, **inputs: np.ndarray) -> np.ndarray:
        (found,) = self.interpreter.run({**self.inputs, **inputs}, self.state).values()
        return found

    def names(self) -> set[str]:
        return {name for step in self.interpreter.function(None).steps for name, _ in step.outputs}


X, Y = numbers(1, 2, 3, 4), numbers(1, 2, 4, 5, seed=1)
MASK = np.where(np.arange(4) < 2, 0, -1e4).astype(np.float32).reshape(1, 1, 1, 4)
ROWS, TABLE = np.array([4, 0, 2], np.int32), numbers(5, 4)
Row = tuple[Made, dict[str, Any], np.ndarray]
CASES: dict[str, Row] = {
    "add": (lambda ops, v: ops.add(v["x"], v["m"], "n.a"), {"x": X, "m": MASK}, X.astype(np.float64) + MASK),
    "multiply": (lambda ops, v: ops.multiply(v["x"], v["m"], "n.a"), {"x": X, "m": MASK}, X * MASK.astype(np.float64)),
    "scale": (lambda ops, v: ops.scale(v["x"], 0.3, "n.a"), {"x": X}, X * 0.3),
    "matmul": (lambda ops, v: ops.matmul(v["x"], v["y"], "n.a"), {"x": X, "y": Y}, X.astype(np.float64) @ Y),
    "masked_softmax": (
        lambda ops, v: ops.masked_softmax(v["x"], v["m"], "n.a"), {"x": X, "m": MASK}, softmax(X + MASK)
    ),
    "silu": (lambda ops, v: ops.silu(v["x"], "n.a"), {"x": X}, X / (1 + np.exp(-X.astype(np.float64)))),
    "gather": (lambda ops, v: ops.gather(ops.constant(TABLE, "t"), v["r"], "n.a"), {"r": ROWS}, TABLE[ROWS]),
    "bias": (lambda ops, v: ops.add(ops.vector("w4.bias"), v["x"], "n.a"), {"x": X[..., :1]},
             X[..., :1] + GAMMA[:8].numpy()),
    "reshape": (lambda ops, v: ops.reshape(v["x"], (1, 3, 8)), {"x": X}, X.reshape(1, 3, 8)),
    "transpose": (lambda ops, v: ops.transpose(v["x"], (0, 3, 1, 2)), {"x": X}, X.transpose(0, 3, 1, 2)),
    "slice": (lambda ops, v: ops.slice(v["x"], 2, 1, 3), {"x": X}, X[:, :, 1:3]),
    "concat": (lambda ops, v: ops.concat([v["x"], v["y"]], 2), {"x": X, "y": Y[..., :4]},
               np.concatenate([X, Y[..., :4]], 2)),
    "cached": (lambda ops, v: ops.scale(ops.cached(v["x"], "k"), 1.0, "n.a"), {"x": X}, X),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_its_formula(name: str, tmp_path: Path) -> None:
    made, inputs, wanted = CASES[name]
    np.testing.assert_allclose(Saved(tmp_path, made, **inputs).found, wanted, rtol=1e-5, atol=1e-6)


def test_a_norm_divides_by_the_root_of_the_mean_square(tmp_path: Path) -> None:
    x = numbers(1, TOKENS, 64)
    found = Saved(tmp_path, lambda ops, given: ops.rms_norm(given["x"], "norm", "n"), x=x).found
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * GAMMA.double().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_linear_multiplies_by_what_the_codes_stand_for(name: str, wide: bool, tmp_path: Path) -> None:
    x = numbers(1, TOKENS, 64)
    made = Saved(tmp_path, lambda ops, given: ops.linear(given["x"], name, "n"), wide=wide, x=x)
    dense = WEIGHTS[name].dequantize().double().numpy()
    np.testing.assert_allclose(made.found, x.astype(np.float64) @ dense.T, rtol=1e-3, atol=1e-4)
    constants = dict(made.interpreter.package.constants("main"))[name]
    values = {part: made.interpreter.package.value(value) for part, value in constants.items()}
    codes = WEIGHTS[name].codes.numpy().astype(int)
    if name.endswith("a"):
        np.testing.assert_array_equal(values["offset"], WEIGHTS[name].zeros.numpy())
        assert values["data"].dtype == np.uint8
    else:
        codes -= 8 if name == "w4" else 128
        assert set(values) == {"data", "scale"} and values["data"].dtype == np.int8
    kinds = {"w4": "int4", "w4a": "uint4", "w8": "int8", "w8a": "uint8"}
    assert value_type(constants["data"].type).dtype == kinds[name]
    np.testing.assert_array_equal(values["data"], codes)
    np.testing.assert_array_equal(values["scale"], WEIGHTS[name].scales.numpy())
    assert values["scale"].dtype == (np.float32 if wide else np.float16)


TABLES = {**WEIGHTS, "w8 in groups": rounded(8, 32, True)}


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_a_table_are_looked_up(name: str, tmp_path: Path) -> None:
    rows = np.array([[5, 0, 5]], np.int32)
    made = Saved(tmp_path, lambda ops, given: ops.rows("embed", given["r"], "n"), Source(TABLES[name]), r=rows)
    np.testing.assert_allclose(made.found[0], TABLES[name].dequantize().numpy()[rows[0]], rtol=1e-6)
    assert ("n_codes" in made.names()) == (name == "w8")  # never decompressed whole


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("wide", [True, False])
def test_new_keys_are_written_behind_those_that_the_cache_holds(wide: bool, axis: int, tmp_path: Path) -> None:
    shape = (1, 2, SLOTS, 4) if axis == 2 else (1, 2, 4, SLOTS)
    new = numbers(*(TOKENS if size == SLOTS else size for size in shape))

    def made(ops: MilOps, given: dict[str, Any]) -> Any:
        return ops.concat([given["cache"], given["x"]], axis)

    program = Saved(tmp_path, made, wide=wide, cache=shape, x=new)
    held = np.zeros(shape)
    np.moveaxis(held, axis, 0)[:TOKENS] = np.moveaxis(new, axis, 0)
    np.testing.assert_allclose(program.found, held, rtol=1e-3)
    second = program.run(x=2 * new, position=np.array([4], np.int32))
    np.moveaxis(held, axis, 0)[4 : 4 + TOKENS] = np.moveaxis(2 * new, axis, 0)
    np.testing.assert_allclose(second, held, rtol=1e-3)
    np.testing.assert_allclose(program.state["cache"], held, rtol=1e-3)
    last = program.interpreter.function(None).steps[-1]
    assert [kind.dtype for _, kind in last.outputs] == ["fp32" if wide else "fp16"]
    package = program.interpreter.package
    sizes = {package.value(value["val"]).size for _, value in package.constants("main")}
    assert 0 not in sizes


def test_names_of_what_only_moves_are_counted_by_their_source(tmp_path: Path) -> None:
    def made(ops: MilOps, given: dict[str, Any]) -> Any:
        first = ops.concat([given["x"], given["y"]], 2)
        return ops.reshape(ops.concat([first, given["y"]], 2), (88,))

    assert Saved(tmp_path, made, x=X, y=Y[..., :4]).names() == {"y_concat1", "y_concat2", "y_concat2_reshape1"}


def test_a_weight_is_read_once_for_its_parts_and_let_go() -> None:
    source = Source()
    weights = Constants(source, "float16")
    assert weights.layout("w4") == WeightForm((8, 64), 2, 4, True) == weights.layout("w4")
    assert weights.tensor("w4") is WEIGHTS["w4"] and source.reads == 1
    weights.tensor("w8")
    weights.tensor("w4")
    assert source.reads == 3 and weights.tensor("embed") is source.table
    weights.tensor("w4")
    weights.providers["w4"] = lambda: np.zeros(1)
    weights.forget()
    assert not weights.providers and source.reads == 4
    weights.tensor("w4")
    assert source.reads == 5
    source.table = replace(source.table, scales=source.table.scales.float())
    assert Constants(source, "float32").tensor("embed") is source.table
    with pytest.raises(TargetError, match="have more digits"):
        Constants(source, "float16").tensor("embed")


def test_a_name_has_no_dots() -> None:
    assert identifier("layers.0.q_rope/x") == "layers_0_q_rope_x"


def test_sizes_are_those_of_codes_scales_and_zero_points() -> None:
    assert WeightForm((8, 64), 2, 4, True).nbytes == 8 * 64 // 2 + 8 * 2 * 2
    assert WeightForm((8, 64), 2, 4, False).nbytes == 8 * 64 // 2 + 8 * 2 * 2 + 8 * 2 // 2
    assert WeightForm((8, 64), 1, 8, False).nbytes == 8 * 64 + 8 * 2 + 8


def test_signed_codes_are_codes_less_the_middle() -> None:
    for bits, middle in ((4, 8), (8, 128)):
        codes = torch.arange(2**bits, dtype=torch.uint8)[None]
        one = torch.ones(1, 1)
        made = QuantizedTensor(codes, one.half(), (one * middle).to(torch.uint8), bits, -1)
        assert signed_codes(made).dtype == np.int8
        assert signed_codes(made).tolist() == [[code - middle for code in range(2**bits)]]


def test_a_constant_of_another_shape_or_type_than_the_program_says_is_not_saved(tmp_path: Path) -> None:
    def lying(array: np.ndarray) -> Made:
        def made(ops: MilOps, given: dict[str, Any]) -> Any:
            table = ops.constant(np.zeros((1, 1, 3, 4)), "t")
            ops._weights.providers["t"] = lambda: array
            return ops.add(given["x"], table, "n")

        return made

    for index, array in enumerate((np.zeros((1, 3, 4), np.float32), np.zeros((1, 1, 3, 4)))):
        with pytest.raises(ValueError, match="constant t is"):
            Saved(tmp_path / str(index), lying(array), x=X)


def test_a_manifest_names_specification_and_weights(tmp_path: Path) -> None:
    made = Saved(tmp_path, lambda ops, given: ops.linear(given["x"], "w4", "n"), x=numbers(1, 3, 64))
    assert dict(made.interpreter.package.spec.description.metadata.userDefined)["quantized"] == "digest"
    told = json.loads((made.path / "Manifest.json").read_text())
    items = {item["name"]: item["path"] for item in told["itemInfoEntries"].values()}
    assert items == {name: f"com.apple.CoreML/{name}" for name in ("model.mlmodel", "weights")}
    assert told["itemInfoEntries"][told["rootModelIdentifier"]]["name"] == "model.mlmodel"
    assert all((made.path / "Data" / place).exists() for place in items.values())


def test_an_outline_says_the_same_without_the_streamed_numbers(tmp_path: Path) -> None:
    def made(ops: MilOps, given: dict[str, Any]) -> Any:
        return ops.linear(ops.add(given["x"], ops.constant(GAMMA.numpy(), "t"), "sum"), "w4", "n")

    saved = Saved(tmp_path, made, x=numbers(1, TOKENS, 64))
    told = outline(saved.program, saved.weights.providers, {"quantized": "digest"}, tmp_path / "new" / "folder")
    spec, blobs = saved.interpreter.package.spec, list[Any]()
    assert told.description == spec.description
    for model in (told, spec):
        for op in next(iter(model.mlProgram.functions["main"].block_specializations.values())).operations:
            held = [op.attributes[name] for name in sorted(op.attributes)]
            held += [argument.value for name in sorted(op.inputs) for argument in op.inputs[name].arguments]
            blobs += [one.blobFileValue for one in held if one.WhichOneof("value") == "blobFileValue"]
    assert (
        [blob.offset for blob in blobs[:3]] == [0, 0, 0] and len(blobs) == 6 and 0 not in {b.offset for b in blobs[3:]}
    )
    for blob in blobs:
        blob.offset = 0
    assert told.mlProgram == spec.mlProgram
    assert not any((tmp_path / "new" / "folder" / "weights").iterdir())


def test_a_constant_that_nobody_streams_is_written_as_the_builder_holds_it(tmp_path: Path) -> None:
    def made(ops: MilOps, given: dict[str, Any]) -> Any:
        table = ops.constant(np.ones((1, 1, 3, 4)), "t")
        del ops._weights.providers["t"]
        return ops.add(given["x"], table, "n")

    np.testing.assert_array_equal(Saved(tmp_path, made, x=X).found, X)  # zeros
