"""ExecuTorch with the QNN delegate: compiled graphs as the methods of one program, run on Qualcomm's simulator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bluelm.errors import InputError
from eval.files import size_plan, structure
from eval.speed import estimate
from export.artifacts.artifact import Artifact
from export.executorch.reader import all_delegated
from targets.host.torch_runtime import TorchRuntime
from targets.qualcomm.executorch import open_executorch_qnn, read_methods
from targets.registry import find
from targets.runtime import open_runtime
from tests.packages import requires
from tests.support.checkpoints import lowered as lowering

pytestmark = requires("libatomic1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("executorch-qnn") / "compiled"
    return find("snapdragon", runtime="executorch-qnn").compile(lowering.npu(), folder)


def test_every_method_is_one_call_of_the_delegate(compiled: Artifact) -> None:
    methods = read_methods(compiled.path("methods"))
    named = {method.name for found in methods.values() for method in found}
    assert all_delegated(compiled.path("model")) == dict.fromkeys(named, ("QnnBackend",))
    shares = {m.name: m.value for m in structure.npu_shares(compiled, "npu")}
    assert shares == {"delegated_share": 1, "npu_node_share": 1, "npu_mac_share": 1}
    assert compiled.format == "executorch-qnn" and compiled.soc == "SM8650"
    Artifact.open(compiled.folder).verify()


def test_the_program_answers_as_the_weights_do_and_as_its_graphs(compiled: Artifact) -> None:
    tokens = lowering.tokens(30)
    exact = TorchRuntime(lowering.quantized(), lowering.CONTEXT).logits(tokens)
    with open_runtime(compiled.folder, on="htp") as runtime:
        found = np.concatenate([runtime.prefill(tokens[:28]), *(runtime.decode(token)[None] for token in tokens[28:])])
    with open_runtime(lowering.npu().folder, on="htp") as runtime:
        graphs = np.concatenate([runtime.prefill(tokens[:28]), *(runtime.decode(token)[None] for token in tokens[28:])])
    assert np.array_equal(found, graphs)
    assert lowering.mean_kl(exact, found) < 2e-6


def test_the_program_is_as_large_as_planned(compiled: Artifact) -> None:
    parts = size_plan.planned_parts(lowering.quantized(), compiled)
    assert parts is not None and size_plan.deviation(sum(parts.values()), compiled) < 0.02


def test_a_token_is_estimated_to_read_the_weights_of_one_method(compiled: Artifact) -> None:
    size = compiled.path("model").stat().st_size
    assert 0.49 * size < estimate.work_of(compiled).weight_bytes < 0.51 * size


def test_a_damaged_list_of_methods_is_named(compiled: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(compiled.folder, folder)
    artifact = Artifact.open(folder)
    told = json.loads((folder / "methods.json").read_text())
    for damaged in ("{", json.dumps({"prefill": told["prefill"]})):
        (folder / "methods.json").write_text(damaged)
        with pytest.raises(InputError, match="methods"):
            read_methods(folder / "methods.json")
    for key, name, message in (("inputs", "other", "wants 'other'"), ("name", "other", "cannot load the program")):
        other = json.loads(json.dumps(told))
        other["prefill"][0][key] = [name, *told["prefill"][0]["inputs"][1:]] if key == "inputs" else name
        (folder / "methods.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=message), open_executorch_qnn(artifact) as runtime:
            runtime.prefill([1, 2, 3])


def test_a_program_of_another_border_is_bad_input(compiled: Artifact, tmp_path: Path) -> None:
    """As one whose caches have other bits."""
    folder = tmp_path / "a"
    shutil.copytree(compiled.folder, folder)
    about = json.loads((folder / "artifact.json").read_text())
    about["cache"] = "int8"
    (folder / "artifact.json").write_text(json.dumps(about))
    with (
        pytest.raises(InputError, match="cannot run the program"),
        open_executorch_qnn(Artifact.open(folder)) as runtime,
    ):
        runtime.prefill([1, 2, 3])
