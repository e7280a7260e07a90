"""Estimates from a finished artifact's bytes, against sums worked out by hand."""

from pathlib import Path

import pytest

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from calibration.samples import load_samples
from compress.engine import quantize
from compress.recipe import Recipe
from eval import estimate
from export import onnx_cpu
from export.artifact import Artifact
from tests.tiny import HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, ROWS, tiny_checkpoint


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


def test_speed_is_an_interval_and_says_that_it_is_extrapolated(artifact: Artifact) -> None:
    chip = estimate.chip("Snapdragon 8 Gen 3")
    assert chip is not None
    decode = estimate.speed(artifact, chip, "cpu")[0]
    assert (decode.name, decode.how, decode.subject) == ("decode_tokens_per_s", "estimated", "soc")
    assert decode.low is not None
    assert decode.high is not None
    assert decode.low < decode.value < decode.high
    assert "extrapolated" in decode.note


def test_unknown_chips_have_no_estimate() -> None:
    assert estimate.chip("any arm64 phone") is None


def test_a_run_or_an_artifact_names_the_work(artifact: Artifact, tmp_path: Path) -> None:
    for folder in (artifact.folder, artifact.folder.parent):
        work, name, width = estimate.artifact_work(folder)
        assert work == estimate.work_of(artifact)
        assert name == artifact.folder.parent.name
        assert float(width) == pytest.approx(artifact.bits_per_weight, abs=0.01)
    with pytest.raises(InputError, match="no artifact"):
        estimate.artifact_work(tmp_path)
