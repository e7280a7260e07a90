"""Bisecting: damage of known place and cause is named on runtimes that show their values; sound artifacts pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bluelm.checkpoint import Checkpoint
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from eval.accuracy.bisect import FirstFault
from eval.report import Built
from export.artifacts.artifact import Artifact
from export.coreml import export as coreml
from export.litert import export as litert
from export.lowering.ranges import Ranges, calibrate
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.onnx import npu as onnx_npu
from pipeline.cli import app
from pipeline.judge.bisecting import Bisection
from targets.runtime import Place
from tests.support import damage
from tests.support.checkpoints.rounded import rounded
from tests.support.reports import example

CONTEXT, CHUNK = 96, 48
PLACES: dict[str, Place] = {"onnx-cpu": "cpu", "onnx-npu": "cpu", "litert": "cpu", "coreml": "interpreter"}
IN_BLOCK = "model.layers.1"


class Bench:
    """A checkpoint of three blocks, quantized."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quantized = rounded(folder / "quantized", blocks=3)
        self.checkpoint = Checkpoint.open(folder / "quantized-float")
        self.tokens = self.checkpoint.tokenizer().encode("The sea was calm, 12 boats lay in the harbour. 海上很平静。")
        self.ranges = calibrate(self.quantized, torch.tensor([self.tokens]))

    def make(self, kind: str, source: QuantizedCheckpoint, name: str, ranges: Ranges | None = None) -> Artifact:
        folder = self.folder / f"{kind}-{name}"
        makers: dict[str, Callable[[], Artifact]] = {
            "onnx-cpu": lambda: onnx_cpu.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "onnx-npu": lambda: onnx_npu.export(source, ranges or self.ranges, folder, context=CONTEXT, chunk=CHUNK),
            "litert": lambda: litert.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "coreml": lambda: coreml.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "onnx-genai": lambda: onnx_genai.export(source, folder, context=CONTEXT),
        }
        return makers[kind]()

    def find(
        self, artifact: Artifact, scratch: Path, quantized: QuantizedCheckpoint | None = None
    ) -> FirstFault | None:
        on = PLACES.get(artifact.format, "cpu")
        held = quantized or self.quantized
        return Bisection(artifact, on, held, self.checkpoint, self.tokens, scratch).find()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bisect"))


@pytest.mark.parametrize("kind", PLACES)
def test_a_sound_artifact_and_one_with_other_scales(bench: Bench, tmp_path: Path, kind: str) -> None:
    assert bench.find(bench.make(kind, bench.quantized, "sound"), tmp_path / "a") is None
    found = bench.find(bench.make(kind, damage.scales(bench.quantized), "scales"), tmp_path / "b")
    assert found is not None
    assert (found.place, found.cause) == ("block 1", "weights")
    assert found.tensor.startswith(f"{IN_BLOCK}.")
    assert "other codes or scales in model.layers.1." in found.why
    if kind in ("onnx-cpu", "onnx-npu"):
        assert found.tensor == f"{IN_BLOCK}.self_attn.q_proj"


def test_a_format_that_shows_no_blocks_is_read(bench: Bench, tmp_path: Path) -> None:
    assert bench.find(bench.make("onnx-genai", bench.quantized, "sound"), tmp_path) is None
    found = bench.find(bench.make("onnx-genai", damage.heads(bench.quantized), "heads"), tmp_path)
    assert found is not None
    assert (found.place, found.tensor, found.cause) == ("block 1", f"{IN_BLOCK}.self_attn.q_proj", "weights")
    turned = bench.find(bench.make("onnx-genai", damage.rope(bench.quantized), "rope"), tmp_path)
    assert turned is not None
    assert (turned.place, turned.cause) == ("the whole artifact", "runtime")


@pytest.mark.parametrize(
    ("name", "place", "tensor", "cause"),
    [
        ("heads", "block 1", f"{IN_BLOCK}.self_attn.q_proj", "weights"),
        ("rope", "block 0", "the rope table", "runtime"),
        ("layer norm", "embedding", EMBED, "weights"),
        ("unquantized", "block 1", f"{IN_BLOCK}.mlp.down_proj", "weights"),
        ("cache", "decode", "keys and values", "runtime"),
        ("head", "head", "lm_head", "weights"),
    ],
)
def test_each_damage_is_found_at_its_place(
    bench: Bench, tmp_path: Path, name: str, place: str, tensor: str, cause: str
) -> None:
    def last(whole: str, found: QuantizedTensor) -> QuantizedTensor:
        return replace(found, scales=found.scales * 2) if whole == "lm_head" else found

    sources = {
        "heads": damage.heads,
        "rope": damage.rope,
        "layer norm": lambda q: damage.layer_norm(q, bench.checkpoint),
        "unquantized": lambda q: damage.unquantized(q, bench.checkpoint),
        "head": lambda q: damage.Changed.of(q, last),
    }
    artifact = bench.make("onnx-cpu", sources.get(name, lambda q: q)(bench.quantized), name)
    if name == "cache":
        artifact = damage.forget_cache(artifact)
    found = bench.find(artifact, tmp_path)
    assert found is not None
    assert (found.place, found.tensor, found.cause) == (place, tensor, cause)
    assert found.error > found.expected


def test_a_range_that_is_too_small_is_the_activations_fault(bench: Bench, tmp_path: Path) -> None:
    low, high = bench.ranges.values["layers.1.gate"]
    narrow = bench.ranges.model_copy(update={"values": {**bench.ranges.values, "layers.1.gate": (low / 10, high / 10)}})
    found = bench.find(bench.make("onnx-npu", bench.quantized, "narrow", narrow), tmp_path)
    assert found is not None
    assert (found.place, found.tensor, found.cause) == ("block 1", f"{IN_BLOCK}.mlp.gate_proj", "activations")


def test_a_tensor_that_quantizing_spoiled_is_named(bench: Bench, tmp_path: Path) -> None:
    """The artifact does what its weights say; one of them has little to do with the float one."""

    def spoiled(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        if name != f"{IN_BLOCK}.mlp.up_proj":
            return tensor
        return replace(tensor, codes=15 - tensor.codes)

    source = damage.Changed.of(bench.quantized, spoiled)
    found = bench.find(bench.make("onnx-cpu", source, "spoiled"), tmp_path, source)
    assert found is not None
    assert (found.place, found.tensor, found.cause) == ("block 1", f"{IN_BLOCK}.mlp.up_proj", "weights")
    assert "computes what its weights say" in found.why


def test_the_command_names_it(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    report = example().model_copy(
        update={
            "artifacts": {"cpu": Built(folder="onnx-cpu", on="cpu")},
            "configuration": {"model": str(bench.checkpoint.folder)},
        }
    )
    run.mkdir()
    report.save(run)
    shutil.copytree(bench.quantized.folder, run / "quantized")
    shutil.copytree(bench.make("onnx-cpu", damage.heads(bench.quantized), "command").folder, run / "onnx-cpu")
    done = CliRunner().invoke(app, ["bisect", str(run), "--json", str(tmp_path / "f.json")])
    assert done.exit_code == 0, done.output
    assert "block 1, model.layers.1.self_attn.q_proj: error" in done.output
    assert "cause: weights" in done.output
    assert json.loads((tmp_path / "f.json").read_text())["cpu"]["place"] == "block 1"
    for arguments, problem in (
        (["bisect", str(run), "--artifact", "npu"], "no artifact 'npu'"),
        (["bisect", str(tmp_path)], "holds no report"),
    ):
        bad = CliRunner().invoke(app, arguments)
        assert bad.exit_code == 2
        assert problem in bad.output
    lonely = CliRunner().invoke(app, ["bisect", str(run), "--model", str(tmp_path / "none")])
    assert "what rounding the weights costs is not looked at" in lonely.output
