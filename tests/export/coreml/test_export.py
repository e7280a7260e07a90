"""Core ML artifacts of the demo checkpoint: exact weights, two functions, the reference's answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bluelm.config import ModelConfig
from bluelm.errors import ExportError, InputError, TargetError, UnavailableError
from compress.checkpoint.store import QuantizedCheckpoint
from eval import heldout
from eval.accuracy.compare import Side, compare
from export.artifacts.artifact import Artifact
from export.coreml import export as coreml
from export.coreml.importing import import_coremltools
from export.coreml.package import Package
from export.coreml.program import DECODE, PREFILL
from export.lowering.parts import Part, split
from targets.apple import backend as apple
from targets.apple import macos as coreml_macos
from targets.apple.backend import check_program, check_states, open_interpreter, open_mac, rules
from targets.apple.interpreter.interpreter import Interpreter
from targets.host.torch_runtime import TorchRuntime
from targets.registry import find
from targets.runtime import open_runtime
from tests.support.checkpoints.rounded import Damaged, rounded
from tests.support.checkpoints.shapes import tiny_checkpoint

CONTEXT, CHUNK = 192, 32


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("q") / "demo")


@pytest.fixture(scope="module")
def artifact(demo: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("coreml") / "demo"
    return coreml.export(demo, folder, context=CONTEXT, chunk=CHUNK)


@pytest.fixture(scope="module")
def windows(demo: QuantizedCheckpoint) -> list[list[int]]:
    found = heldout.load([], demo.tokenizer(), length=96).windows
    return [window.tokens.tolist() for window in found[:5]]


def constants(package: Package, function: str, name: str) -> dict[str, np.ndarray]:
    """Parameters of the constexpr that holds a weight, as arrays."""
    found = dict(package.constants(function))[name.replace(".", "_")]
    return {parameter: package.value(value) for parameter, value in found.items()}


def test_the_saved_package_holds_the_very_codes_and_scales(demo: QuantizedCheckpoint, artifact: Artifact) -> None:
    (path,) = coreml.packages(artifact)
    package = Package.open(path)
    for layer in (0, demo.config.num_layers - 1):
        for linear in ("self_attn.q_proj", "mlp.down_proj"):
            tensor = demo.linear(f"model.layers.{layer}.{linear}")
            for function in (PREFILL, DECODE):
                stored = constants(package, function, f"model.layers.{layer}.{linear}")
                assert set(stored) == {"data", "scale"}
                np.testing.assert_array_equal(stored["data"], tensor.codes.numpy().astype(np.int8) - 8)
                assert stored["scale"].dtype == np.float16
                np.testing.assert_array_equal(stored["scale"], tensor.scales.numpy())
    head = constants(package, DECODE, "lm_head")
    np.testing.assert_array_equal(head["data"], demo.linear("lm_head").codes.numpy().astype(np.int16) - 128)
    embedding = dict(package.constants(DECODE))
    codes = package.value(embedding["embed_codes"]["val"])
    np.testing.assert_array_equal(codes, demo.embed().codes.numpy().astype(np.int16) - 128)


def test_both_functions_point_at_the_same_weights(demo: QuantizedCheckpoint, artifact: Artifact) -> None:
    (path,) = coreml.packages(artifact)
    package = Package.open(path)
    offsets = []
    for function in (PREFILL, DECODE):
        found = dict(package.constants(function))
        offsets.append({n: str(v) for n, v in found.items() if n.startswith(("model_layers", "lm_head"))})
    assert offsets[0] == offsets[1] and len(offsets[0]) > 7 * demo.config.num_layers
    weights = next(file for file in artifact.files if file.role == "weights")
    assert weights.bytes < 1.05 * artifact.bits_per_weight / 8 * artifact.parameters


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_width_is_exact(tmp_path: Path, bits: int, symmetric: bool) -> None:
    source = tiny_checkpoint(tmp_path / "tiny")
    group = 32 if bits == 4 else -1
    q = rounded(tmp_path / "q", source=source, bits=bits, group_size=group, symmetric=symmetric)
    made = coreml.export(q, tmp_path / "coreml", context=64, chunk=16)
    (path,) = coreml.packages(made)
    plan = Interpreter(path, rounding=False)
    name = "model.layers.1.mlp.up_proj"
    kind = next(c.kind for n, c in plan.function(DECODE).constants.items() if n == name.replace(".", "_"))
    assert kind.dtype == "fp16"
    found = plan._constant(plan.function(DECODE), name.replace(".", "_"))
    np.testing.assert_array_equal(found, q.linear(name).dequantize().numpy())
    stored = constants(Package.open(path), PREFILL, name)
    assert ("offset" in stored) is not symmetric
    tokens = list(range(5, 45))
    reference = TorchRuntime(q, 64).logits(tokens)
    np.testing.assert_allclose(open_interpreter(made).logits(tokens), reference, atol=0.05)


def test_the_same_input_gives_the_same_bytes(demo: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path) -> None:
    again = coreml.export(demo, tmp_path / "again", context=CONTEXT, chunk=CHUNK)
    assert [file.sha256 for file in again.files] == [file.sha256 for file in artifact.files]
    other = coreml.export(demo, tmp_path / "other", context=CONTEXT, chunk=CHUNK // 2)
    assert [file.sha256 for file in other.files] != [file.sha256 for file in artifact.files]


@pytest.mark.parametrize(("activations", "limit"), [("float32", 1e-4), ("float16", 1e-3)])
def test_the_package_answers_as_the_dequantized_model(
    demo: QuantizedCheckpoint, artifact: Artifact, windows, tmp_path: Path, activations, limit: float
) -> None:
    if activations == "float32":
        artifact = coreml.export(demo, tmp_path / "wide", context=CONTEXT, chunk=CHUNK, activations=activations)
    reference = Side("torch", "dequantized", TorchRuntime(demo, CONTEXT), digest=demo.digest())
    subject = Side("Core ML", "coreml", open_interpreter(artifact))
    (found,) = compare(reference, [subject], windows, [window[:32] for window in windows], 64)
    assert found.kl.value < limit
    assert all(d.length == 64 and (d.at is None or d.tie) for d in found.divergences)


def test_prefill_in_chunks_and_decode_agree_up_to_the_end_of_the_context(artifact: Artifact) -> None:
    tokens = np.random.default_rng(4).integers(5, 6000, CONTEXT).tolist()
    with open_runtime(artifact.folder, "interpreter") as runtime:
        whole = runtime.logits(tokens)  # chunks of 32, the last ones where no chunk fits one by one
        runtime.reset()
        first = runtime.prefill(tokens[: CONTEXT - 20])
        rest = np.stack([runtime.decode(token) for token in tokens[CONTEXT - 20 :]])
        np.testing.assert_allclose(np.concatenate([first, rest]), whole, atol=0.03)
        with pytest.raises(InputError, match=f"do not fit a context of {CONTEXT}"):
            runtime.decode(5)
        runtime.reset()
        np.testing.assert_array_equal(runtime.prefill(tokens[:40]), whole[:40])


def test_several_programs_answer_as_one(demo: QuantizedCheckpoint, artifact: Artifact, tmp_path: Path) -> None:
    many = coreml.export(demo, tmp_path / "many", context=CONTEXT, chunk=CHUNK, program_bytes=2_000_000)
    assert len(coreml.packages(many)) >= 4
    assert max(file.bytes for file in many.files if file.role == "weights") < 2_100_000
    tokens = list(range(100, 170))
    np.testing.assert_array_equal(open_interpreter(many).logits(tokens), open_interpreter(artifact).logits(tokens))


def test_programs_are_cut_where_they_fit() -> None:
    assert split(10, [5, 5, 5], 10, 100) == [Part(True, 0, 3, True)]
    assert split(10, [5, 5, 5], 10, 15) == [
        Part(True, 0, 1, False),
        Part(False, 1, 3, False),
        Part(False, 3, 3, True),
    ]
    with pytest.raises(TargetError, match="the head takes 20 bytes"):
        split(10, [5, 5], 20, 15)


def test_a_debug_build_shows_the_blocks_as_outputs(demo: QuantizedCheckpoint, tmp_path: Path) -> None:
    made = coreml.export(demo, tmp_path / "debug", context=64, chunk=16, debug=True)
    (path,) = coreml.packages(made)
    outputs = Interpreter(path).function(DECODE).outputs
    assert outputs == ("logits", "embedded", *(f"layers_{i}_output" for i in range(demo.config.num_layers)))


def test_other_codes_in_the_saved_package_are_found(demo: QuantizedCheckpoint, artifact: Artifact) -> None:
    (path,) = coreml.packages(artifact)
    part = Part(True, 0, demo.config.num_layers, True)
    coreml.check_package(path, demo, part)
    with pytest.raises(ExportError, match=r"other codes or scales of model\.layers\.2\.self_attn\.q_proj"):
        coreml.check_package(path, Damaged.of(demo, 2), part)


def test_legality_of_programs_and_states(demo: QuantizedCheckpoint, artifact: Artifact) -> None:
    (path,) = coreml.packages(artifact)
    package = Package.open(path)
    assert check_program(package) == ("gather", "less_equal", "select")
    assert check_program(package, unit="cpu") == ()
    with pytest.raises(TargetError, match="needs iOS 18, not 17"):
        check_program(package, ios=17)
    with pytest.raises(TargetError, match=r"a context of 100: Core ML states must be multiples of 32"):
        check_states(demo.config, 100)
    narrow = ModelConfig.from_dict({**demo.config.to_dict(), "head_dim": 16})
    with pytest.raises(TargetError, match="a head dimension of 16"):
        check_states(narrow, 128)


def test_a_program_beyond_what_the_neural_engine_loads_is_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = rules().units["ane"].model_copy(update={"program_bytes": 1000})
    table = rules().model_copy(update={"units": {**rules().units, "ane": small}})
    monkeypatch.setattr(apple, "rules", lambda: table)
    (path,) = coreml.packages(artifact)
    with pytest.raises(TargetError, match="ane loads at most 1,000"):
        check_program(Package.open(path))


def test_the_table_of_ops_is_that_of_coremltools() -> None:
    """The class that an iOS 18 program uses for an op lies in the module of the version that brought it."""
    ct = import_coremltools()
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    saved_as = {"write_state": 18}  # an op of the file alone: coreml_update_state becomes it
    for name, first in rules().ops.items():
        if name in saved_as:
            assert first == saved_as[name]
            continue
        used: Any = SSAOpRegistry.core_ops[name][ct.target.iOS18]
        assert f".iOS{first}." in f"{used.__module__}.", name


def test_what_needs_a_mac_says_so(artifact: Artifact, tmp_path: Path) -> None:
    if sys.platform == "darwin":
        return  # tests/targets/apple/test_macos.py runs it there
    for unit in ("cpu", "gpu", "ane"):
        with pytest.raises(UnavailableError, match=f"running on {unit} needs macOS") as caught:
            open_mac(artifact, unit)
        assert caught.value.exit_code == 5
    with pytest.raises(UnavailableError, match="coremlcompiler needs macOS"):
        coreml_macos.compile_package(coreml.packages(artifact)[0], tmp_path)
    with pytest.raises(InputError, match="no compute unit 'npu'"):
        open_mac(artifact, "npu")


def test_the_target_lowers_in_float32_where_asked_and_says_what_that_means(tmp_path: Path) -> None:
    q = rounded(tmp_path / "q", source=tiny_checkpoint(tmp_path / "tiny"))
    target = find("apple", activation_bits=32)
    made = target.lower(q, None, tmp_path / "a", context=64, chunk=16)
    assert made.notes[0] == "float32 activations"
    assert any("the Neural Engine computes in float16 alone" in note for note in made.notes)
    assert any(note.startswith("left to the CPU by the Neural Engine: gather") for note in made.notes)
    with pytest.raises(InputError, match="litert does not support --activation-bits 32"):
        find("dimensity", runtime="litert", activation_bits=32)


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Another seed of Python's hashes, and so another order of everything that is not ordered."""
    q = rounded(tmp_path / "q", source=tiny_checkpoint(tmp_path / "tiny"))
    here = coreml.export(q, tmp_path / "here", context=64, chunk=16)
    there = tmp_path / "there"
    code = (
        "from pathlib import Path; from compress.checkpoint.store import QuantizedCheckpoint; "
        "from export.coreml import export as coreml; "
        f"coreml.export(QuantizedCheckpoint.open('{q.folder}'), Path('{there}'), context=64, chunk=16)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(coreml.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert [file.sha256 for file in Artifact.open(there).files] == [file.sha256 for file in here.files]
