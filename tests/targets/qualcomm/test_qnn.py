"""Snapdragon artifacts: compiled, run on Qualcomm's simulator, nothing left to the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from bluelm.errors import TargetError
from export.artifacts.artifact import Artifact, list_files
from targets.host.torch_runtime import TorchRuntime, TwinRuntime
from targets.qualcomm.compile import refusal_reasons, refused_nodes
from targets.registry import find
from targets.runtime import open_runtime
from tests.packages import requires
from tests.support.checkpoints import lowered as lowering

pytestmark = requires("libatomic1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("qnn") / "compiled"
    return find("snapdragon").compile(lowering.npu(), folder)


def test_the_npu_took_every_node(compiled: Artifact) -> None:
    assert compiled.format == "qnn-context" and compiled.soc == "SM8650"
    for graph in ("prefill", "decode"):
        source = onnx.load(lowering.npu().path(graph), load_external_data=False)
        count = compiled.nodes[graph]
        assert count.on_npu == count.in_graph == len(source.graph.node)
        wrapper = onnx.load(compiled.path(graph), load_external_data=False)
        assert [node.op_type for node in wrapper.graph.node] == ["EPContext"]


def test_what_ships_holds_the_weights_once(compiled: Artifact) -> None:
    apart = sum(file.bytes for file in compiled.files if file.role == "simulator-context")
    together = compiled.path("context").stat().st_size
    weights = lowering.npu().path("weights").stat().st_size
    assert together < apart - 0.5 * weights
    assert compiled.bytes == sum(f.bytes for f in compiled.files if not f.role.startswith("simulator"))
    assert Artifact.open(compiled.folder) == compiled
    Artifact.open(compiled.folder).verify()
    assert compiled.folder.with_name("compiled.compile.log").exists()


def test_the_simulator_answers_as_the_twin(compiled: Artifact) -> None:
    tokens = lowering.tokens(30)
    exact = TorchRuntime(lowering.quantized(), lowering.CONTEXT).logits(tokens)
    twin = TwinRuntime(lowering.quantized(), lowering.ranges(), lowering.CONTEXT).logits(tokens)
    with open_runtime(compiled.folder, on="htp") as runtime:
        found = runtime.logits(tokens)
        runtime.reset()
        parts = [runtime.prefill(tokens[:13]), runtime.prefill(tokens[13:28])]
        parts += [runtime.decode(token)[None] for token in tokens[28:]]
    assert lowering.mean_kl(twin, found) < 2e-6
    assert lowering.mean_kl(exact, found) < 2e-6
    assert lowering.mean_kl(found, np.concatenate(parts)) < 1e-6


@pytest.mark.parametrize("recipe", ["w8-g32", "w4-row", "w8-row-head4"])
def test_other_widths_and_groups(recipe: str, tmp_path: Path) -> None:
    """What HTP accepts it must also compute."""
    tokens, quantized = lowering.tokens(6), lowering.quantized(recipe)
    exact = TorchRuntime(quantized, lowering.CONTEXT).logits(tokens)
    compiled = find("snapdragon").compile(lowering.npu(recipe), tmp_path / "compiled")
    with open_runtime(compiled.folder, on="htp") as runtime:
        assert lowering.mean_kl(exact, runtime.logits(tokens)) < 3e-6


@pytest.mark.parametrize("soc", ["sm8550", "sm8750", "sm8850"])
def test_other_chips(soc: str, tmp_path: Path) -> None:
    compiled = find("snapdragon", soc).compile(lowering.npu(), tmp_path / soc)
    tokens = lowering.tokens(4)
    exact = TorchRuntime(lowering.quantized(), lowering.CONTEXT).logits(tokens)
    with open_runtime(compiled.folder, on="htp") as runtime:
        assert lowering.mean_kl(exact, runtime.logits(tokens)) < 2e-6


def planted(folder: Path, kind: str) -> Artifact:
    """A copy of the artifact whose decode graph has one more node of `kind` in block 0."""
    shutil.copytree(lowering.npu().folder, folder)
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    index = next(i for i, n in enumerate(model.graph.node) if n.output[0] == "layers.0.output.exact")
    target = model.graph.node[index]
    model.graph.node.insert(index, helper.make_node(kind, [target.input[0]], ["planted"], name="planted"))
    model.graph.node[index + 1].input[0] = "planted"
    onnx.save(model, folder / "decode.onnx")
    files = list_files(folder, {file.path: file.role for file in lowering.npu().files})
    artifact = lowering.npu().model_copy(update={"files": files})
    artifact.save(folder)
    return artifact


def test_a_refused_node_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    artifact = planted(tmp_path / "planted", "Acosh")
    with pytest.raises(TargetError) as caught:
        find("snapdragon").compile(artifact, tmp_path / "compiled")
    message = str(caught.value)
    assert "refused 1 nodes of decode.onnx" in message
    assert "planted (Acosh): Operators of type `Acosh` are not supported" in message
    assert caught.value.exit_code == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compiled.compile.log", "planted"]


def test_no_session_falls_back_to_the_cpu(tmp_path: Path) -> None:
    """The same graph runs on the CPU, so a silent fall back would give an answer."""
    artifact = planted(tmp_path / "planted", "Asinh")
    with open_runtime(artifact.folder, on="cpu") as runtime:
        assert runtime.decode(5).shape == (lowering.VOCAB,)
    with pytest.raises(TargetError, match="refused the graph"):
        open_runtime(artifact.folder, on="htp")


def test_a_damaged_binary_is_a_target_error(compiled: Artifact, tmp_path: Path) -> None:
    shutil.copytree(compiled.folder, tmp_path / "damaged")
    binary = tmp_path / "damaged" / "simulator" / "prefill_qnn.bin"
    binary.write_bytes(b"\0" * binary.stat().st_size)
    with pytest.raises(TargetError, match="refused the graph"):
        open_runtime(tmp_path / "damaged", on="htp")


def test_log_lines() -> None:
    """Lines as onnxruntime-qnn 2.5 writes them."""
    log = (
        "[E:onnxruntime:] Unsupported nodes in QNN EP: { name: a, type: MatMul }, { name: b c, type: Add }\n"
        "[W] QNN.backendValidateOpConfig() failed for node `a` of type `Dot` with error code 3110\n"
        "[V] Validation FAILED for 2 nodes in OrtNodeUnit (MatMul) :\n"
        "\tOperator type: DequantizeLinear Node name: dq Node index: 1\n"
        "\tOperator type: Add Node name: b c Node index: 2\n"
        "\tREASON : Failed to add it.\n"
    )
    assert refused_nodes(log) == [("a", "MatMul"), ("b c", "Add")]
    assert refusal_reasons(log) == {
        "dq": "Failed to add it.",
        "b c": "Failed to add it.",
        "a": "QNN's Dot does not take it (error 3110)",
    }
