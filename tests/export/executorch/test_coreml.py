"""ExecuTorch with the Core ML delegate: one lowering of a tiny model, one of whose blocks is damaged."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from bluelm.errors import ExportError, InputError, TargetError, UnavailableError
from compress.checkpoint.store import QuantizedCheckpoint
from compress.recipe import Recipe
from eval.accuracy.compare import Side, block_errors, weights_steps
from eval.files import size_plan, structure
from export.artifacts.artifact import Artifact
from export.executorch import coreml as executorch_coreml
from export.executorch.coreml_reader import unpack
from export.readback import differing
from targets.apple.executorch import open_executorch_coreml
from targets.host.torch_runtime import TorchRuntime
from targets.registry import find
from targets.runtime import open_runtime
from tests.support.answers import mean_kl
from tests.support.checkpoints.rounded import Damaged, rounded
from tests.support.checkpoints.shapes import LINEARS, SEVEN, tiny_checkpoint

CONTEXT, CHUNK = 32, 8
TOKENS = np.random.default_rng(3).integers(5, 6000, 21).tolist()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("executorch-coreml")
    return rounded(folder / "q", source=tiny_checkpoint(folder / "tiny"))


@pytest.fixture(scope="module")
def hurt(sound: QuantizedCheckpoint) -> Damaged:
    return Damaged.of(sound, 1)


@pytest.fixture(scope="module")
def artifact(hurt: Damaged, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("executorch-coreml") / "a"
    target = find("apple", runtime="executorch-coreml")
    return target.lower(hurt, None, folder, context=CONTEXT, chunk=CHUNK)


def test_the_program_holds_the_very_codes_in_both_methods(
    artifact: Artifact, hurt: Damaged, sound: QuantizedCheckpoint, tmp_path: Path
) -> None:
    executorch_coreml.check_program(artifact.path("model"), hurt)
    with pytest.raises(ExportError, match=r"other codes or scales of model\.layers\.1\.self_attn\.q_proj"):
        executorch_coreml.check_program(artifact.path("model"), sound)
    block = [f"model.layers.1.{name}" for name in LINEARS]
    assert sorted(differing(artifact, sound) or []) == sorted(block)
    assert differing(artifact, hurt) == []
    program = unpack(artifact.path("model"), tmp_path)
    places = []
    for method in program.methods.values():
        held = [v for _, v in program.package.constants(method.function) if "data" in v]
        assert program.package.value(held[0]["data"]).max() <= 7  # int4
        places.append([(v["data"].blobFileValue.offset, v["scale"].blobFileValue.offset) for v in held])
    assert places[0] == places[1] and len(places[0]) == 15


def test_what_coremltools_cannot_hold_here_is_refused_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16e9))
    target = find("apple", runtime="executorch-coreml")
    with pytest.raises(TargetError, match=r"about 1\d GB of memory \(an estimate\), 16 GB are available"):
        target.check(replace(SEVEN, num_layers=2), Recipe.load("w4-g32"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=24e9))
    target.check(replace(SEVEN, num_layers=2), Recipe.load("w4-g32"))


def test_all_is_delegated_but_the_unit_is_not_known_and_the_size_is_as_planned(
    artifact: Artifact, hurt: Damaged
) -> None:
    (share,) = structure.npu_shares(artifact, "npu")
    assert (share.name, share.value) == ("delegated_share", 1.0)
    (told,) = structure.not_known(artifact, [])
    assert "Core ML chooses the unit on the device" in told
    parts = size_plan.planned_parts(hurt, artifact)
    assert parts is not None
    assert size_plan.deviation(sum(parts.values()), artifact) < 0.02


def test_prefill_in_chunks_and_decode_answer_as_the_dequantized_model(artifact: Artifact, hurt: Damaged) -> None:
    expected = TorchRuntime(hurt, CONTEXT).logits(TOKENS)
    with open_runtime(artifact.folder, "interpreter") as runtime:
        assert mean_kl(expected, runtime.logits(TOKENS)) < 1e-4
        runtime.reset()
        stepped = np.stack([runtime.decode(token) for token in TOKENS])
    assert mean_kl(expected, stepped) < 1e-4


def test_the_damaged_block_is_named_in_the_program_itself(artifact: Artifact, sound: QuantizedCheckpoint) -> None:
    steps = weights_steps(sound, CONTEXT)
    reference = Side("torch", "dequantized", TorchRuntime(sound, CONTEXT), steps, sound, sound.digest())
    with open_executorch_coreml(artifact) as runtime:
        subject = Side("pte", artifact.format, runtime, lambda t: runtime.blocks(list(t)), digest=reference.digest)
        found = block_errors(reference, subject, TOKENS)
    assert found.first_outside == 1 and found.errors[0] < 0.002, found


def test_units_need_a_mac(artifact: Artifact) -> None:
    if sys.platform == "darwin":
        pytest.skip("this is one")
    with pytest.raises(UnavailableError, match="running on ane needs macOS"):
        open_runtime(artifact.folder, "ane")


def test_a_damaged_program_is_bad_input(artifact: Artifact, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact.folder, tmp_path / "copy"))
    content = (copy / "model.pte").read_bytes()
    for broken in (bytes(len(content)), content.replace(b"CMJR", b"XXXX")):
        (copy / "model.pte").write_bytes(broken)
        with pytest.raises(InputError, match=r"not an ExecuTorch program|no reference to a package"):
            open_runtime(copy, "interpreter")


def test_a_7b_is_refused_in_advance() -> None:
    with pytest.raises(TargetError, match="do not fit one program of"):
        find("apple", runtime="executorch-coreml").check(SEVEN, Recipe.load("w4-g32"))
