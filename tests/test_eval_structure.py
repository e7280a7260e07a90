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
from eval.budget import Budget, Check, Verdict, judge
from export import gguf_file, litert, onnx_cpu, onnx_genai
from export.artifact import Artifact
from export.readback import differing, linear_names
from pipeline import judging
from pipeline.inspecting import Inspector
from pipeline.judging import Subject
from targets.runtime import open_runtime
from tests import damage
from tests.rounded import rounded

CONTEXT, CHUNK, TOKENS = 128, 64, 384
BUDGET = Budget(max_perplexity_ratio=1.1, max_mean_kl=0.02, min_top1_agreement=0.85, max_prefill_decode_kl=0.001)
EXPORTERS: dict[str, Callable[..., Artifact]] = {
    "onnx-cpu": lambda q, folder: onnx_cpu.export(q, folder, context=CONTEXT, chunk=CHUNK),
    "litert": lambda q, folder: litert.export(q, folder, context=CONTEXT, chunk=CHUNK),
    "gguf": lambda q, folder: gguf_file.export(q, folder, context=CONTEXT),
    "onnx-genai": lambda q, folder: onnx_genai.export(q, folder, context=CONTEXT),
}


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

    def judge(self, artifact: Artifact) -> Verdict:
        found = judging.judge_artifacts(self.inspector, [Subject("cpu", artifact, "cpu", TOKENS)], Silent())
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
    artifact = bench.make(kind, bench.quantized, "sound")
    assert differing(artifact, bench.quantized) == []
    verdict = bench.judge(artifact)
    assert verdict.passed, [str(failure) for failure in verdict.failures]
    asked = {check.name for check in verdict.checks}
    assert {"max_weight_mismatches", "max_runtime_kl_excess", "max_bits_per_weight_deviation"} <= asked


@pytest.mark.parametrize("kind", EXPORTERS)
def test_damaged_weights_are_named_in_every_format(bench: Bench, kind: str) -> None:
    block = [name for name in linear_names(bench.quantized) if name.startswith("model.layers.1.")]
    query, down = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    for name, source, wrong in (
        ("scales", damage.scales(bench.quantized), block),
        ("heads", damage.heads(bench.quantized), [query]),
        ("layer-norm", damage.layer_norm(bench.quantized, bench.checkpoint), [EMBED]),
        ("unquantized", damage.unquantized(bench.quantized, bench.checkpoint), [down]),
    ):
        artifact = bench.make(kind, source, name)
        assert sorted(differing(artifact, bench.quantized) or []) == sorted(wrong), name


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
    source = sources.get(name, lambda q: q)(bench.quantized)
    artifact = bench.make("onnx-cpu", source, f"gate-{name}")
    if name == "float":
        artifact = damage.float_matrix(artifact, bench.checkpoint)
    elif name == "tokenizer":
        artifact = damage.shift_tokenizer(artifact)
    elif name == "cache":
        artifact = damage.forget_cache(artifact)
    failed = names(bench.judge(artifact))
    assert found <= failed, failed


def test_end_tokens_are_held_against_the_files_that_name_them(bench: Bench) -> None:
    from eval.structure import end_token

    source = damage.Changed.of(bench.quantized, eos_token_ids=(7,))
    for kind in ("onnx-genai", "gguf"):
        artifact = bench.make(kind, source, "ends")
        with open_runtime(artifact.folder) as runtime:
            figure = end_token(artifact, bench.checkpoint.config, runtime, [1, 2, 3], "cpu")
        assert figure.value >= 1
        assert "artifact.json says [7]" in figure.note


def test_a_fault_is_told_by_the_check(bench: Bench) -> None:
    artifact = damage.shift_tokenizer(bench.make("onnx-cpu", bench.quantized, "told"))
    checks: dict[str, Check] = {check.name: check for check in bench.judge(artifact).failures}
    assert "and " in checks["max_tokenizer_mismatches"].note
    assert "texts" in str(checks["max_tokenizer_mismatches"])
