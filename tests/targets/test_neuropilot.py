"""A run for a Dimensity's NPU ends with an artifact that nobody here can judge: exit code 5, never passed.

MediaTek's SDK is not public. A stand-in takes the place of its two modules: it says that it supports every operator
and compiles to a note of what it was given. All else is real: our lowering, ExecuTorch's delegate, the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from executorch.exir._serialize._program import deserialize_pte_binary

from bluelm.errors import UnavailableError
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable
from pipeline.cli import main
from targets.runtime import open_runtime
from tests.support.checkpoints.shapes import tiny_checkpoint

CONVERTER = """
class PyTorchV2Converter:
    @classmethod
    def from_exported_program(cls, program):
        made = cls()
        made.constants = sorted({str(tensor.dtype) for tensor in program.state_dict.values()})
        return made

    def convert_to_mlir(self):
        return "constants " + " ".join(self.constants)
"""
IMPORTER = "def is_fx_node_supported(node):\n    return True\n"
NEURON = """
def compile(mlir, options):
    return f"{mlir} {options}".encode()

def extract_shared_data(models, options):
    return b"shared", models
"""


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "sdk"
    importer = "mtk_converter/python/converters/pytorch/importer_v2.py"
    for path, text in (("mtk_converter/__init__.py", CONVERTER), (importer, IMPORTER), ("mtk_neuron.py", NEURON)):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    for name in ("mtk_converter", "mtk_neuron"):
        about = place / f"{name}-8.13.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 8.13\n")
    monkeypatch.syspath_prepend(place)


@pytest.mark.usefixtures("sdk")
def test_the_artifact_is_made_and_nothing_is_said_to_have_passed(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    model = tiny_checkpoint(tmp_path / "tiny")
    arguments = ["--target", "dimensity-9400", "--runtime", "executorch-neuropilot", "--model", str(model)]
    arguments += ["--out", str(tmp_path), "--name", "run", "--method", "rtn", "--samples", "8", "--length", "32"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--context", "32", "--chunk", "8"])
    said = " ".join(capfd.readouterr().err.split())
    assert left.value.code == 5, said
    assert "nothing was measured, so it has not passed" in said and "MT6991" in said
    run = tmp_path / "run"
    assert not (run / "report.json").exists() and not list(run.glob("*.apk"))

    artifact = Artifact.open(run / "executorch-neuropilot")
    assert artifact.soc == "MT6991" and artifact.producers["mtk_neuron"] == "8.13"
    held = artifact.path("model").read_bytes()
    plans = deserialize_pte_binary(held).program.execution_plan
    assert {plan.name: [delegate.id for delegate in plan.delegates] for plan in plans} == {
        "prefill": ["NeuropilotBackend"],
        "decode": ["NeuropilotBackend"],
    }
    assert b"--platform-config=mt6991" in held and b"torch.int8" in held  # codes reach the converter as codes
    quantized = QuantizedCheckpoint.open(run / "quantized")
    assert EmbeddingTable.open(artifact.path("embedding")).rows([1]).shape == (1, quantized.config.hidden_size)
    with pytest.raises(UnavailableError, match="only a phone"):
        open_runtime(artifact.folder)
    assert "mtk_neuron" in sys.modules
