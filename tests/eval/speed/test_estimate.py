"""Estimates from a finished artifact's bytes, against sums worked out by hand."""

from pathlib import Path

import pytest

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from calibration.samples import load_samples
from compress.engine import quantize
from compress.recipe import Recipe
from eval.speed import estimate, speed_model
from eval.speed.speed_fit import published
from eval.speed.speed_model import RuntimeClass, find_soc
from export.artifacts.artifact import Artifact
from export.formats import names
from export.onnx import cpu as onnx_cpu
from tests.support.checkpoints.shapes import TINY, tiny_checkpoint

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, ROWS = TINY.values()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("estimate")
    checkpoint = Checkpoint.open(tiny_checkpoint(folder / "model"))
    recipe = Recipe.make({"method": "rtn", "samples": 1, "length": 16})
    samples = load_samples(None, checkpoint.tokenizer(), 1, 16, 0)
    quantized = quantize(checkpoint, samples, recipe, folder / "quantized")
    return onnx_cpu.export(quantized, folder / "onnx-cpu", context=256, chunk=64)


def test_bytes_of_a_token_are_the_weights_and_the_cache(artifact: Artifact) -> None:
    work = estimate.work_of(artifact)
    head_dim = HIDDEN // HEADS
    weights = LAYERS * (HIDDEN * head_dim * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER)
    least = weights * 4.5 / 8 + ROWS * HIDDEN  # 4 bits and a float16 scale for 32; the head in 8 bits
    assert least < work.weight_bytes < 1.3 * least  # the graphs themselves are in it
    assert work.cache_bytes == 2 * LAYERS * KV_HEADS * head_dim * 256 * 4  # float32
    assert work.operations == 2 * (weights + ROWS * HIDDEN) + 4 * LAYERS * HEADS * head_dim * 256


def test_memory_is_files_cache_and_activations(artifact: Artifact) -> None:
    found = estimate.memory(artifact)
    assert found.how == "estimated"
    logits = 4 * 64 * ROWS
    assert found.value > artifact.bytes + estimate.cache_bytes(artifact) + logits
    assert found.value < artifact.bytes + estimate.cache_bytes(artifact) + 2 * logits


def test_no_speed_where_nothing_published_speaks_for_it(artifact: Artifact) -> None:
    chip = estimate.chip("Snapdragon 8 Gen 3")
    assert chip is not None
    assert estimate.speed(artifact, chip) == []  # float32 arithmetic, whatever its size
    assert "float32 arithmetic" in str(estimate.not_known(artifact))
    small = artifact.model_copy(update={"format": "onnx-genai"})
    assert estimate.speed(small, chip) == []
    assert f"below 0.5 B parameters, and this has {artifact.parameters / 1e6:.1f} M" in str(estimate.not_known(small))
    assert estimate.not_known(small.model_copy(update={"parameters": 500_000_000})) is None


@pytest.mark.parametrize(
    ("kind", "chip", "runtime_class", "runtime"),
    [
        ("coreml", "A17 Pro", "ane", "Core ML (coreml-llm-cli)"),
        ("executorch-coreml", "A17 Pro", "ane", ""),
        ("qnn-context", "Snapdragon 8 Gen 3", "npu", "QNN"),
        ("executorch-qnn", "Snapdragon 8 Gen 3", "npu", "ExecuTorch"),
        ("onnx-genai", "Snapdragon 8 Gen 3", "cpu", ""),
        ("executorch-xnnpack", "A17 Pro", "cpu", "ExecuTorch"),
        ("litert", "Dimensity 9300", "cpu", "LiteRT / MediaPipe"),
        ("gguf", "Snapdragon 8 Gen 3", "cpu", ""),
    ],
)
def test_speed_is_that_of_the_artifact_s_own_class(
    artifact: Artifact, kind: str, chip: str, runtime_class: RuntimeClass, runtime: str
) -> None:
    large = artifact.model_copy(update={"format": kind, "parameters": 1_000_000_000})
    soc = find_soc(chip)
    decode = estimate.speed(large, soc)[0]
    assert (decode.name, decode.how, decode.subject) == ("decode_tokens_per_s", "estimated", "soc")
    assert f"({runtime_class})" in decode.note
    expected = speed_model.estimate("decode", estimate.work_of(large), soc, runtime_class, runtime=runtime)
    assert (decode.low, decode.value, decode.high) == (expected.low, expected.value, expected.high)
    known = {row.runtime for row in published("decode") if row.runtime_class == runtime_class}
    assert not runtime or runtime in known
    assert expected.low < expected.value < expected.high


def test_every_format_has_a_class_or_a_reason(artifact: Artifact) -> None:
    for kind in names():
        large = artifact.model_copy(update={"format": kind, "parameters": 1_000_000_000})
        assert bool(large.record.speed) == (estimate.not_known(large) is None)


def test_unknown_chips_have_no_estimate() -> None:
    assert estimate.chip("any arm64 phone") is None


def test_a_run_or_an_artifact_names_the_work(artifact: Artifact, tmp_path: Path) -> None:
    for folder in (artifact.folder, artifact.folder.parent):
        found, name = estimate.find_artifact(folder)
        assert found == artifact
        assert name == artifact.folder.parent.name
    with pytest.raises(InputError, match="no artifact"):
        estimate.find_artifact(tmp_path)
