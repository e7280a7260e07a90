"""What arithmetic may cost: a twin for each runtime, held against it, and damage that must lie beyond them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from compress.checkpoint.store import QuantizedCheckpoint
from eval import heldout
from eval.accuracy import positions
from eval.accuracy.arithmetic import _table, allowance, allowed, beside_twin
from eval.accuracy.compare import local_errors
from eval.accuracy.positions import Allowance
from eval.accuracy.twins import InputsRounded, Twin, ValuesRounded, twin_of
from eval.heldout import HeldOut, Window
from export.artifacts.artifact import Artifact
from export.coreml import export as coreml
from export.formats import records
from export.litert import export as litert
from export.lowering.ranges import calibrate
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from pipeline.judge.inspecting import Inspector
from targets.block_outputs import open_blocks
from targets.host.rounding import ByColumns, by_token, in_blocks, to_half
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import natural, open_runtime
from tests.support import damage
from tests.support.checkpoints import lowered
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint

CONTEXT = 512


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("arithmetic") / "q", blocks=2)


def test_every_format_has_limits_where_there_is_no_twin() -> None:
    assert {kind.arithmetic for kind in records().values()} == set(_table()["linears"])


def test_rounding_in_blocks_and_by_token_follow_their_formulas() -> None:
    x = torch.tensor([[1.0, -127.0, 0.4, 0.6, 10.0, 0.0, -20.0, 5.0, 3.0, 254.0]])
    assert in_blocks(x[:, :4], 4).tolist() == [[1.0, -127.0, 0.0, 1.0]]
    assert in_blocks(x, 8)[0, 8:].tolist() == [4.0, 254.0]  # the last block has two columns: 3 is half of a step of 2
    assert in_blocks(torch.zeros(2, 3), 4).tolist() == [[0.0] * 3] * 2
    assert by_token(torch.tensor([[0.0, 255.0, 100.4]])).tolist() == [[0.0, 255.0, 100.0]]
    assert by_token(torch.tensor([[5.0, 255.0]])).tolist() == [[5.0, 255.0]]  # the range holds zero
    assert by_token(torch.tensor([[-100.0, 155.0, 0.0], [0.0, 0.0, 0.0]])).tolist() == [[-100.0, 155.0, 0.0], [0.0] * 3]
    assert ByColumns(((3, 4),))(x).equal(x)
    assert to_half(torch.tensor([1 + 2**-12, 1e6])).tolist() == [1.0, float("inf")]


MAKERS: dict[str, Callable[[QuantizedCheckpoint, Path], Artifact]] = {
    "8 bits in blocks": lambda q, f: onnx_cpu.export(q, f, context=32, chunk=8, accuracy_level=4),
    "8 bits in blocks, genai": lambda q, f: onnx_genai.export(q, f, context=32, accuracy_level=4),
    "a range a token": lambda q, f: litert.export(q, f, context=32, chunk=8),
    "float16": lambda q, f: coreml.export(q, f, context=32, chunk=8),
    "16 bits": lambda q, f: lowered.npu(),
    "a float16 cache": lambda q, f: onnx_cpu.export(q, f, context=32, chunk=8, kv_bits=16),
    "an int8 cache": lambda q, f: onnx_cpu.export(q, f, context=32, chunk=8, kv_bits=8, ranges=lowered.ranges()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_twin_errs_as_its_runtime_does(tmp_path: Path, name: str) -> None:
    """In size, block by block; where rounding follows the same formula bit for bit, in direction too."""
    source = lowered.quantized()
    artifact = MAKERS[name](source, tmp_path / "a")
    on, tokens = natural(artifact.format), lowered.tokens(24)
    twin = twin_of(artifact, on)
    assert twin is not None
    with open_blocks(artifact, on, tmp_path / "scratch") as runtime:
        stream = runtime.blocks(tokens)
    errors = local_errors(source, stream, 32, (artifact.format, "dequantized"), True, twin)
    assert errors.first_outside is None
    for layer in range(2):
        x, after = (torch.from_numpy(stream[i : i + 1]) for i in (layer, layer + 1))
        plain, own = twin.block(source, layer, x, 32)
        size = (own - plain).norm()
        assert 0.5 < (after - plain).norm() / size < 1.5
        if name == "a range a token":
            assert (after - own).norm() < 0.35 * size


def test_a_twin_holds_the_weights_of_the_checkpoint_and_not_those_of_the_artifact(tmp_path: Path) -> None:
    source = lowered.quantized()
    hurt = damage.scales(source, 1)
    twin = InputsRounded(by_token, None)
    stream = twin.pair(TorchRuntime(hurt, 32))[0]
    assert isinstance(stream, TorchRuntime)
    errors = local_errors(source, stream.blocks(lowered.tokens(24)), 32, ("litert", "dequantized"), True, twin)
    assert errors.first_outside == 1 and errors.excess > 1


def twins(quantized: QuantizedCheckpoint) -> dict[str, Twin]:
    text = torch.tensor([_text(quantized, 256)])
    return {
        "float32": InputsRounded(None, None),
        "8 bits in blocks": InputsRounded(ByColumns(tuple((n, 32) for n in (256, 512, 704, 768))), None),
        "a range a token": InputsRounded(by_token, None),
        "float16": ValuesRounded(),
        "16 bits": ValuesRounded(calibrate(quantized, text)),
        "HTP": ValuesRounded(calibrate(quantized, text), noisy=True),
    }


def _text(quantized: QuantizedCheckpoint, length: int) -> list[int]:
    windows = heldout.load([], quantized.tokenizer()).windows
    return [int(t) for window in windows[:4] for t in window.tokens][:length]


def test_a_rope_base_off_by_a_twentieth_is_beyond_what_any_arithmetic_may_cost(quantized: QuantizedCheckpoint) -> None:
    """At the first positions it costs less than 8-bit activations do; over the whole context it shows."""
    text = _text(quantized, CONTEXT)
    plan = positions.plan(CONTEXT, 128, 4096, 16, seeks=True)
    exact = TorchRuntime(quantized, CONTEXT)
    own = positions.reference(exact, text, [plan])[plan.pieces]
    found = positions.run(TorchRuntime(damage.rope(quantized, 1.05), CONTEXT), text, plan, own)
    limits = {name: Allowance(**row) for name, row in _table()["linears"].items()}
    limits |= {f"{name}, twin": beside_twin(twin, exact, text, plan, own) for name, twin in twins(quantized).items()}
    for name, most in limits.items():
        figures = {m.name: m.value for m in positions.figures(found, most, "cpu")}
        assert figures["runtime_kl_excess"] > 1, name
        assert figures["runtime_kl"] > 5 * figures["runtime_kl@prefill 0-63"], name


def test_a_lowered_decoder_that_is_wrong_allows_nothing_more(
    quantized: QuantizedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of NPUs shares code with their exporter: only rounding may stand between its two sides."""
    text = _text(quantized, 64)
    plan = positions.plan(64, 64, 64, 4, seeks=True)
    exact = TorchRuntime(quantized, 64)
    own = positions.reference(exact, text, [plan])[plan.pieces]
    sound = beside_twin(ValuesRounded(), exact, text, plan, own)
    from export.lowering import torch_ops

    def twice(self: torch_ops.TorchOps, x: Tensor, name: str) -> Tensor:
        return x * torch.sigmoid(2 * x)

    monkeypatch.setattr(torch_ops.TorchOps, "silu", twice)
    wrong = beside_twin(ValuesRounded(), exact, text, plan, own)
    assert wrong.range < 3 * sound.range


def test_an_honest_artifact_of_a_model_with_massive_activations_is_within_its_twin(tmp_path: Path) -> None:
    """The same function, one channel of the MLP 60 times as large: 8-bit activations cost what would have failed
    by the demo's limits; damage is still beyond."""
    folder = write_checkpoint(tmp_path / "model", vocab=lowered.VOCAB)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("up_proj.weight"):
            tensors[name][3] *= 60
        elif name.endswith("down_proj.weight"):
            tensors[name][:, 3] /= 60
    save_file(tensors, folder / "model.safetensors")
    source = rounded(tmp_path / "q", source=folder)
    artifact = litert.export(source, tmp_path / "a", context=64, chunk=16)
    window = Window(np.array(lowered.tokens(64)), np.ones(64, bool), "x", np.zeros(64, int))
    inspector = Inspector(Checkpoint.open(folder), source, HeldOut((window,), "", "", 64), 64)
    inspector.expect([(artifact, "cpu")])

    def figures(made: Artifact) -> dict[str, float]:
        with open_runtime(made.folder) as runtime:
            found = [*inspector.positions(made, "cpu", runtime, "cpu"), *inspector.blocks(made, "cpu", "cpu")]
        return {m.name: m.value for m in found}

    honest = figures(artifact)
    assert honest["runtime_kl"] > 3 * allowed("8-bit activations", "float32").range
    assert max(honest[f"{name}_excess"] for name in ("runtime_kl", "position_kl", "block_error")) < 1
    assert inspector.allowance(artifact, "cpu").range > allowance(artifact).range
    hurt = litert.export(damage.rope(source), tmp_path / "hurt", context=64, chunk=16)
    found = figures(hurt)
    assert min(found["block_error_excess"], found["runtime_kl_excess"]) > 2


def test_without_a_twin_an_onnx_artifact_is_allowed_what_its_linears_and_its_cache_cost(
    quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    table = {name: Allowance(**row) for kind in ("linears", "caches") for name, row in _table()[kind].items()}
    plain = onnx_genai.export(quantized, tmp_path / "a", context=64)
    coarse = onnx_genai.export(quantized, tmp_path / "b", context=64, accuracy_level=4)
    narrow = onnx_cpu.export(quantized, tmp_path / "c", context=64, chunk=16, kv_bits=16)
    assert allowance(plain) == table["float32"]
    assert allowance(coarse) == table["8-bit activations"]
    assert allowance(narrow).range == table["float32"].range + table["float16"].range
