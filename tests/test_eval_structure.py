"""The gate on artifacts that were damaged on purpose, on runtimes that are quick; benchmarks/gate.py has them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bluelm.checkpoint import Checkpoint
from bluelm.progress import Silent
from compress.store import EMBED, QuantizedCheckpoint
from eval import heldout
from eval.budget import Budget, Verdict, judge
from export import coreml, gguf_file, litert, onnx_cpu, onnx_genai
from export.artifact import Artifact
from export.readback import differing, linear_names
from pipeline import judging
from pipeline.inspecting import Inspector
from pipeline.judging import Subject
from targets.runtime import Place, open_runtime
from tests import damage
from tests.rounded import rounded

CONTEXT, CHUNK, TOKENS = 128, 64, 384
BUDGET = Budget(max_perplexity_ratio=1.1, max_mean_kl=0.02, min_top1_agreement=0.85, max_prefill_decode_kl=0.001)
EXPORTERS: dict[str, Callable[..., Artifact]] = {
    "onnx-cpu": lambda q, folder: onnx_cpu.export(q, folder, context=CONTEXT, chunk=CHUNK),
    "litert": lambda q, folder: litert.export(q, folder, context=CONTEXT, chunk=CHUNK),
    "gguf": lambda q, folder: gguf_file.export(q, folder, context=CONTEXT),
    "onnx-genai": lambda q, folder: onnx_genai.export(q, folder, context=CONTEXT),
    "coreml": lambda q, folder: coreml.export(q, folder, context=CONTEXT, chunk=CHUNK),
}
PLACES: dict[str, Place] = {"coreml": "interpreter"}


class Bench:
    """A checkpoint of two blocks, quantized, and the gate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quantized: QuantizedCheckpoint = rounded(folder / "quantized", layers=2)
        self.checkpoint = Checkpoint.open(folder / "quantized-float")
        held_out = heldout.load([], self.checkpoint.tokenizer(), length=CONTEXT)
        held_out = replace(held_out, texts=held_out.texts[::12])
        self.inspector = Inspector(self.checkpoint, self.quantized, held_out, CONTEXT)

    def make(self, kind: str, source: QuantizedCheckpoint, name: str) -> Artifact:
        return EXPORTERS[kind](source, self.folder / f"{kind}-{name}")

    def sound(self, kind: str) -> Artifact:
        """Made once."""
        folder = self.folder / f"{kind}-sound"
        return Artifact.open(folder) if folder.exists() else self.make(kind, self.quantized, "sound")

    def judge(self, artifact: Artifact) -> Verdict:
        subject = Subject("cpu", artifact, PLACES.get(artifact.format, "cpu"), TOKENS)
        found = judging.judge_artifacts(self.inspector, [subject], Silent())
        return judge(BUDGET, found.figures, ("cpu",), found.samples)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "GREEDY_TOKENS", 4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("gate"))


def names(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.failures}


@pytest.mark.parametrize("kind", EXPORTERS)
def test_a_sound_artifact_passes_and_its_weights_are_found_in_it(bench: Bench, kind: str) -> None:
    artifact = bench.sound(kind)
    assert differing(artifact, bench.quantized) == []
    verdict = bench.judge(artifact)
    assert verdict.passed, [str(failure) for failure in verdict.failures]
    asked = {check.name for check in verdict.checks}
    assert {"max_weight_mismatches", "max_runtime_kl_excess", "max_bits_per_weight_deviation"} <= asked


@pytest.mark.parametrize("kind", EXPORTERS)
def test_every_damaged_weight_is_named_and_a_forgotten_cache_seen_in_every_format(bench: Bench, kind: str) -> None:
    """Four damages at once, and a decode that forgets; benchmarks/gate.py has each alone on every runtime."""
    hurt = damage.heads(damage.scales(bench.quantized, layer=1), layer=0)
    hurt = damage.layer_norm(damage.unquantized(hurt, bench.checkpoint, layer=0), bench.checkpoint)
    artifact = bench.make(kind, hurt, "hurt")
    block = [name for name in linear_names(bench.quantized) if name.startswith("model.layers.1.")]
    wrong = [*block, "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", EMBED]
    assert sorted(differing(artifact, bench.quantized) or []) == sorted(wrong)
    with damage.forgetting():
        failed = names(bench.judge(artifact))
    assert {"max_weight_mismatches", "max_runtime_kl_excess", "max_prefill_decode_kl"} <= failed


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("scales", {"max_weight_mismatches", "max_runtime_kl_excess", "max_block_error_excess"}),
        ("heads", {"max_weight_mismatches", "max_runtime_kl_excess", "max_block_error_excess"}),
        ("rope", {"max_runtime_kl_excess", "max_block_error_excess"}),
        ("layer-norm", {"max_weight_mismatches", "max_runtime_kl_excess", "max_mean_kl"}),
        ("unquantized", {"max_weight_mismatches", "max_runtime_kl_excess"}),
        ("float", {"max_weight_mismatches", "max_bits_per_weight_deviation", "max_runtime_kl_excess"}),
        ("tokenizer", {"max_tokenizer_mismatches", "max_chat_template_mismatches"}),
        ("cache", {"max_prefill_decode_kl"}),
    ],
)
def test_each_damage_fails_the_gate(bench: Bench, name: str, found: set[str]) -> None:
    sources = {
        "scales": damage.scales,
        "heads": damage.heads,
        "rope": damage.rope,
        "layer-norm": lambda q: damage.layer_norm(q, bench.checkpoint),
        "unquantized": lambda q: damage.unquantized(q, bench.checkpoint),
    }
    if name in sources:
        artifact = bench.make("onnx-cpu", sources[name](bench.quantized), f"gate-{name}")
    else:
        artifact = damage.copied(bench.sound("onnx-cpu"), bench.folder / f"gate-{name}")
    if name == "float":
        artifact = damage.float_matrix(artifact, bench.checkpoint)
    elif name == "tokenizer":
        artifact = damage.shift_tokenizer(artifact)
    elif name == "cache":
        artifact = damage.forget_cache(artifact)
    verdict = bench.judge(artifact)
    failed = names(verdict)
    assert found <= failed, failed
    if name == "tokenizer":
        (told,) = [check for check in verdict.failures if check.name == "max_tokenizer_mismatches"]
        assert "and " in told.note
        assert "texts" in str(told)


def test_end_tokens_are_held_against_the_files_that_name_them(bench: Bench) -> None:
    from eval.structure import end_token

    source = damage.Changed.of(bench.quantized, eos_token_ids=(7,))
    for kind in ("onnx-genai", "gguf"):
        artifact = bench.make(kind, source, "ends")
        with open_runtime(artifact.folder) as runtime:
            figure = end_token(artifact, bench.checkpoint.config, runtime, [1, 2, 3], "cpu")
        assert figure.value >= 1
        assert "artifact.json says [7]" in figure.note
