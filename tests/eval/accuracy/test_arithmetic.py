"""What formats may cost: a limit for each, and damage that must lie beyond all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.checkpoint.store import QuantizedCheckpoint
from eval import heldout
from eval.accuracy import positions
from eval.accuracy.arithmetic import Allowance, _table, allowance
from export.formats import records
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from targets.host.torch_runtime import TorchRuntime
from tests.support import damage
from tests.support.checkpoints.rounded import rounded

CONTEXT = 512


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("arithmetic") / "q", blocks=2)


def test_every_format_has_its_limits() -> None:
    assert {kind.arithmetic for kind in records().values()} == set(_table()["linears"])


def test_a_rope_base_off_by_a_twentieth_is_beyond_what_any_format_may_cost(quantized: QuantizedCheckpoint) -> None:
    """At the first positions it costs less than 8-bit activations do; over the whole context it shows."""
    windows = heldout.load([], quantized.tokenizer()).windows
    text = [int(t) for window in windows[:4] for t in window.tokens][:CONTEXT]
    plan = positions.plan(CONTEXT, 128, 4096, 16, seeks=True)
    expected = positions.reference(TorchRuntime(quantized, CONTEXT), text, [plan])[plan.pieces]
    found = positions.run(TorchRuntime(damage.rope(quantized, 1.05), CONTEXT), text, plan, expected)
    for name, row in _table()["linears"].items():
        figures = {m.name: m.value for m in positions.figures(found, Allowance(**row), "cpu")}
        assert figures["runtime_kl_excess"] > 1, name
        assert figures["runtime_kl"] > 5 * figures["runtime_kl@prefill 0-63"], name


def test_an_onnx_artifact_is_allowed_what_its_linears_and_its_cache_cost(
    quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    table = {name: Allowance(**row) for kind in ("linears", "caches") for name, row in _table()[kind].items()}
    plain = onnx_genai.export(quantized, tmp_path / "a", context=64)
    coarse = onnx_genai.export(quantized, tmp_path / "b", context=64, accuracy_level=4)
    narrow = onnx_cpu.export(quantized, tmp_path / "c", context=64, chunk=16, kv_bits=16)
    assert allowance(plain) == table["float32"]
    assert allowance(coarse) == table["8-bit activations"]
    found = allowance(narrow)
    assert found is not None
    assert found.range == table["float32"].range + table["float16"].range
