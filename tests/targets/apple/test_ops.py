"""The interpreter's ops, each built and saved by coremltools and held against torch on random inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bluelm.errors import InputError
from export.coreml.importing import import_coremltools
from export.coreml.package import Package
from targets.apple.interpreter.interpreter import Interpreter
from targets.apple.interpreter.ops import OPS, Arguments
from tests.support.files.coreml_cases import INTS, SHAPES, cases, save


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Interpreter, list[list[str]]]:
    """One package with every case of the table, and the output names of each case."""
    ct = import_coremltools()
    from coremltools.converters.mil.mil import Builder, types

    mb: Any = Builder
    specs = [mb.TensorSpec(shape, types.fp32) for shape in SHAPES.values()]
    specs += [mb.TensorSpec(shape, types.int32) for shape in INTS.values()]
    names: list[list[str]] = []
    table = cases()

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def built(x, y, p, q, k, v, mask, i, j, n, at):  # type: ignore[no-untyped-def]
        values = dict(zip([*SHAPES, *INTS], (x, y, p, q, k, v, mask, i, j, n, at), strict=True))
        outputs = []
        for case in table:
            results = case.mil(mb, values)
            results = list(results) if isinstance(results, (list, tuple)) else [results]
            names.append([f"case_{len(names)}_{r}" for r in range(len(results))])
            outputs += [mb.identity(x=r, name=n) for r, n in zip(results, names[-1], strict=True)]
        return tuple(outputs)

    return Interpreter(save(built, tmp_path_factory.mktemp("ops") / "ops.mlpackage")), names


def random_inputs(seed: int, scale: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    floats = {n: (rng.standard_normal(s) * scale).astype(np.float32) for n, s in SHAPES.items()}
    floats["p"] = np.abs(floats["p"]) + np.float32(0.1)
    return floats | {n: rng.integers(0, 4, s).astype(np.int32) for n, s in INTS.items()}


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 1.0, 5.0]))
@settings(max_examples=15)
def test_every_op_computes_what_torch_computes(program, seed: int, scale: float) -> None:
    interpreter, names = program
    inputs = random_inputs(seed, scale)
    found = interpreter.run(inputs)
    tensors = {n: torch.from_numpy(a) for n, a in inputs.items()}
    for case, outputs in zip(cases(), names, strict=True):
        expected = case.torch(tensors)
        expected = expected if isinstance(expected, list) else [expected]
        for name, want in zip(outputs, expected, strict=True):
            got = found[name]
            assert got.shape == tuple(want.shape), case.op
            if case.op == "cast" and want.dtype == torch.float16:
                np.testing.assert_array_equal(got, want.float().numpy(), err_msg=case.op)
            elif not want.is_floating_point():
                np.testing.assert_array_equal(got, want.numpy(), err_msg=case.op)
            else:
                np.testing.assert_allclose(got, want.numpy(), rtol=2e-5, atol=2e-5 * scale, err_msg=case.op)


def test_every_op_of_the_table_is_in_the_program(program) -> None:
    interpreter, _ = program
    ran = {step.type for step in interpreter.functions["main"].steps}
    compressed = {name for name in OPS if name.startswith("constexpr_")}  # tests/export/coreml/test_package.py
    assert set(OPS) - compressed - ran == set()


@st.composite
def slicings(draw: st.DrawFn) -> tuple[list[int], dict[str, list[Any]]]:
    """A shape, and begin, end, stride and masks that select at least one element of it."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    arguments: dict[str, list[Any]] = {k: [] for k in ("begin", "end", "stride")}
    arguments |= {k: [] for k in ("begin_mask", "end_mask", "squeeze_mask")}
    for size in shape:
        begin = draw(st.integers(0, size - 1))
        end = draw(st.integers(begin + 1, size))
        negative = draw(st.booleans())
        arguments["begin"].append(begin - size if negative else begin)
        arguments["end"].append(end)
        arguments["stride"].append(draw(st.integers(1, 3)))
        for mask in ("begin_mask", "end_mask", "squeeze_mask"):
            arguments[mask].append(draw(st.booleans()))
    return shape, arguments


@given(slicings())
@settings(max_examples=60)
def test_slices_are_those_of_coremltools_own_evaluation(drawn) -> None:
    import_coremltools()
    from coremltools.converters.mil.mil import Builder, Function

    mb: Any = Builder
    shape, arguments = drawn
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with Function({}):
        theirs = mb.slice_by_index(x=x, **arguments).val
    ours: Any = OPS["slice_by_index"](Arguments(x=x, **{k: np.array(v) for k, v in arguments.items()}))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "bounds", "why"),
    [
        ("slice_by_size", {"begin": [0, 1], "size": [2, 3]}, "leaves"),
        ("slice_by_index", {"begin": [0, 0], "end": [1, 1, 1]}, "dimensions"),
        ("slice_update", {"begin": [0, 0, 0], "end": [1, 1, 1], "update": [[1]]}, "dimensions"),
    ],
)
def test_a_slice_that_does_not_fit_is_an_error_and_not_a_shorter_one(
    name: str, bounds: dict[str, Any], why: str
) -> None:
    arrays = {key: np.array(value) for key, value in bounds.items()}
    with pytest.raises(InputError, match=why):
        OPS[name](Arguments(x=np.zeros((2, 3)), **arrays))


def test_an_index_outside_is_an_error_and_not_a_wrong_number(program) -> None:
    interpreter, _ = program
    inputs = random_inputs(0, 1.0)
    inputs["i"] = np.full(INTS["i"], 4, np.int32)
    with pytest.raises(InputError, match=r"gather: index 4\.\.4 outside 0\.\.3"):
        interpreter.run(inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("x"), r"needs the inputs \['x'\]"),
        (lambda i: i.update(z=np.zeros(1)), r"has no inputs \['z'\]"),
        (lambda i: i.update(x=np.zeros((2, 2), np.float32)), "input 'x' has shape"),
    ],
)
def test_wrong_inputs_are_named(program, change, message: str) -> None:
    inputs = random_inputs(0, 1.0)
    change(inputs)
    with pytest.raises(InputError, match=message):
        program[0].run(inputs)


def test_unknown_functions_and_values_are_named(program) -> None:
    interpreter, _ = program
    with pytest.raises(InputError, match="no function 'decode'; the package has main"):
        interpreter.run({}, function="decode")
    with pytest.raises(InputError, match=r"no value named \['nowhere'\]"):
        interpreter.run(random_inputs(0, 1.0), watch=["nowhere"])
    with pytest.raises(InputError, match="not a Core ML package"):
        Package.open(Path(__file__))
