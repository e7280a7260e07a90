"""What Qualcomm's HTP compiler takes, and how exactly its simulator computes it: small graphs, one idea each.

    python -m benchmarks.npu.htp_trials [--soc SM8650 ...]

Each trial is one MatMul between 16-bit activations, compiled with CPU fallback forbidden; the error is the
relative L2 distance to float64. Writes the part "trials" of results/npu/htp_trials.json, and the page.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks import pages
from bluelm.errors import TargetError
from targets.host.child import Child
from targets.qualcomm.backend import chip_of
from targets.qualcomm.messages import Chip, LoadGraphs, RunGraph
from targets.socs import find_soc

COLUMNS, ROWS, TOKENS = 256, 96, 8
WRONG = 1e-3  # 16-bit activations leave less than this


@dataclass(frozen=True)
class Trial:
    """A graph with inputs, and what it should give."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]
    expected: np.ndarray


def weight_trial(bits: int, block: int, kind: str) -> Trial:
    """x [1, T, in] times a weight of `bits` in blocks of `block` (0: one scale a row).

    Kinds: symmetric; zeros (explicit zero points, all 0); asymmetric.
    """
    random = np.random.default_rng(0)
    weight = random.normal(size=(COLUMNS, ROWS))
    groups = COLUMNS // block if block else 1
    grouped = weight.reshape(groups, -1, ROWS)
    top = 2 ** (bits - 1) - 1
    scales = (np.abs(grouped).max(1) / (top - 3 * (kind == "asymmetric"))).astype(np.float16).astype(np.float32)
    zeros = random.integers(-3, 4, scales.shape) if kind == "asymmetric" else np.zeros(scales.shape, np.int64)
    codes = np.clip(np.rint(grouped / scales[:, None]) + zeros[:, None], -top - 1, top)
    exact = ((codes - zeros[:, None]) * scales[:, None].astype(np.float64)).reshape(COLUMNS, ROWS)
    dtype = ml_dtypes.int4 if bits == 4 else np.int8
    attributes: dict[str, Any] = {"axis": 0, "block_size": block} if block else {"axis": 1}
    parts = [codes.reshape(COLUMNS, ROWS).astype(dtype), scales if block else scales[0]]
    if kind != "symmetric":
        parts.append((zeros if block else zeros[0]).astype(dtype))
    inputs = [numpy_helper.from_array(part, f"w{index}") for index, part in enumerate(parts)]
    dequantize = helper.make_node("DequantizeLinear", [i.name for i in inputs], ["w"], **attributes)
    x = random.normal(size=(1, TOKENS, COLUMNS)).clip(-4, 4).astype(np.float32)
    name = f"int{bits} weight, {f'blocks of {block}' if block else 'one scale a row'}, {kind}"
    return matmul_trial(name, x, exact, [dequantize], inputs, {})


def activation_trial(dtype: str) -> Trial:
    """Two activations multiplied; the second in codes of `dtype`, symmetric if signed."""
    random = np.random.default_rng(0)
    a = random.normal(size=(1, 4, 64, 32)).clip(-4, 4).astype(np.float32)
    b = random.normal(size=(1, 4, 32, 96)).clip(-4, 4).astype(np.float32)
    nodes, inputs = quantize_pair("b", "w", -4.0, 4.0, np.dtype(dtype))
    return matmul_trial(f"activations uint16 x {dtype}", a, b.astype(np.float64), nodes, inputs, {"b": b})


def matmul_trial(
    name: str,
    a: np.ndarray,
    b: np.ndarray,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[TensorProto],
    feeds: dict[str, np.ndarray],
) -> Trial:
    """uint16 a times the tensor `w` that `nodes` make."""
    expected = a.astype(np.float64) @ b
    reach = float(np.abs(expected).max())
    before, first = quantize_pair("a", "x", -4.0, 4.0, np.dtype("uint16"))
    after, last = quantize_pair("exact", "y", -reach, reach, np.dtype("uint16"))
    matmul = helper.make_node("MatMul", ["x", "w"], ["exact"])
    feeds = {"a": a, **feeds}
    graph = helper.make_graph(
        [*before, *nodes, matmul, *after],
        "trial",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in feeds.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, expected.shape)],
        [*first, *inputs, *last],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Trial(name, model, feeds, expected)


def quantize_pair(
    source: str, name: str, low: float, high: float, dtype: np.dtype
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """`source` to codes and back to `name`."""
    limits = np.iinfo(dtype)
    if limits.min < 0:
        scale, zero = np.float32(max(-low, high) / limits.max), 0
    else:
        scale = np.float32((high - low) / limits.max)
        zero = round(-low / float(scale))
    parts = [
        numpy_helper.from_array(np.array(scale, np.float32), f"{name}.scale"),
        numpy_helper.from_array(np.array(zero, dtype), f"{name}.zero"),
    ]
    names = [part.name for part in parts]
    return [
        helper.make_node("QuantizeLinear", [source, *names], [f"{name}.codes"]),
        helper.make_node("DequantizeLinear", [f"{name}.codes", *names], [name]),
    ], parts


def run(trial: Trial, chip: Chip, folder: Path) -> str:
    """Relative error on the simulator, or why it was refused."""
    path = folder / "trial.onnx"
    onnx.save(trial.model, path)
    child = Child("targets.qualcomm.worker", folder / "trial.log")
    try:
        child.call(LoadGraphs("trial", str(path), chip), 60)
        found = child.call(RunGraph("trial", trial.inputs), 60).outputs["y"]
    except TargetError:
        return "refused"
    finally:
        child.close()
    error = np.linalg.norm(found - trial.expected) / np.linalg.norm(trial.expected)
    return f"{error:.1e}" if error < WRONG else f"**{error:.1e}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soc", nargs="+", default=["SM8650"])
    socs: list[str] = parser.parse_args().soc
    chips = [chip_of(find_soc(soc)) for soc in socs]
    kinds = ("symmetric", "zeros", "asymmetric")
    trials = [weight_trial(bits, block, kind) for bits in (4, 8) for block in (32, 64, 128, 0) for kind in kinds]
    trials += [activation_trial(dtype) for dtype in ("uint16", "int16", "uint8", "int8")]
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for trial in trials:
            rows.append([trial.name, *(run(trial, chip, Path(folder)) for chip in chips)])
            print(rows[-1], flush=True)
    about = {"names": [trial.name for trial in trials], "compiler": version("onnxruntime-qnn")}
    pages.save_rows("htp_trials", "trials", ("trial", *socs), rows, **about)


if __name__ == "__main__":
    main()
