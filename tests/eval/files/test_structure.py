"""The gate on artifacts that were damaged on purpose, on quick runtimes; benchmarks/gate/command.py has them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.system.progress import Silent
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from eval import heldout
from eval.budget.budget import Verdict, judge
from eval.budget.limits import Budget
from eval.files.structure import files
from eval.measurement import Measurement
from export.artifacts.artifact import Artifact, Format
from export.coreai import export as coreai
from export.coreml import export as coreml
from export.gguf import export as gguf_file
from export.litert import export as litert
from export.litert_lm import export as litert_lm
from export.mlx import export as mlx
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.readback import differing, linear_names
from export.readback.items import GRAPH
from pipeline.judge import judging
from pipeline.judge.inspecting import Inspector
from pipeline.judge.judging import Subject
from targets.runtime import Place, open_runtime
from tests.support import damage
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.damages import ALL, DAMAGES, Damage, copied, damaged, graphs, judged_as, metadata

CONTEXT, CHUNK, TOKENS = 128, 32, 384
BUDGET = Budget(max_perplexity_ratio=1.1, max_mean_kl=0.02, min_top1_agreement=0.85, max_prefill_decode_kl=0.001)
EXPORTERS: dict[str, Callable[..., Artifact]] = {
    "onnx-cpu": lambda q, folder: onnx_cpu.export(q, folder, context=CONTEXT, chunk=CHUNK),
    "litert": lambda q, folder: litert.export(q, folder, context=CONTEXT, chunk=CHUNK),
    "gguf": lambda q, folder: gguf_file.export(q, folder, context=CONTEXT),
    "mlx": lambda q, folder: mlx.export(q, folder, context=CONTEXT),
    "litert-lm": lambda q, folder: litert_lm.export(q, folder, context=CONTEXT),
    "coreai": lambda q, folder: coreai.export(q, folder, context=CONTEXT),
    "coreai-ane": lambda q, folder: coreai.export_static(q, folder, context=CONTEXT, chunk=CHUNK),
    "onnx-genai": lambda q, folder: onnx_genai.export(q, folder, context=CONTEXT),
    "coreml": lambda q, folder: coreml.export(q, folder, context=CONTEXT, chunk=CHUNK),
}
PLACES: dict[str, Place] = {"coreml": "interpreter"}
LLAMA = "LlamaForCausalLM"
QUICK: tuple[Format, ...] = ("onnx-cpu", "onnx-genai")


class Bench:
    """A checkpoint of two blocks, quantized, and the gate."""

    def __init__(self, folder: Path) -> None:
        self.out = folder
        self.quantized: QuantizedCheckpoint = rounded(folder / "quantized", blocks=2)
        self.checkpoint = Checkpoint.open(folder / "quantized-float")
        held_out = heldout.load([], self.checkpoint.tokenizer(), length=CONTEXT)
        held_out = replace(held_out, texts=held_out.texts[::12])
        self.inspector = Inspector(self.checkpoint, self.quantized, held_out, CONTEXT)

    def place(self, name: str) -> Path:
        return self.out / name

    def artifact(self, kind: str, source: QuantizedCheckpoint, name: str) -> Artifact:
        folder = self.place(name) / kind
        return Artifact.open(folder) if folder.exists() else EXPORTERS[kind](source, folder)

    def sound(self, kind: str) -> Artifact:
        """Made once."""
        return self.artifact(kind, self.quantized, "none")

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
    """Four damages at once, and a decode that forgets; benchmarks/gate/command.py has each alone on every runtime."""
    hurt = damage.heads(damage.scales(bench.quantized, layer=1), layer=0)
    hurt = damage.layer_norm(damage.unquantized(hurt, bench.checkpoint, layer=0), bench.checkpoint)
    artifact = bench.artifact(kind, hurt, "hurt")
    block = [name for name in linear_names(bench.quantized) if name.startswith("model.layers.1.")]
    wrong = [*block, "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", EMBED]
    held = set(differing(artifact, bench.quantized))
    assert held - {GRAPH} == set(wrong)  # a matrix of another width is another graph, too
    with judged_as(Damage("cache", (), run=damage.Forgetful)):
        failed = names(bench.judge(artifact))
    assert {"max_weight_mismatches", "max_runtime_kl_excess", "max_prefill_decode_kl"} <= failed


NAMED = {
    "scales": {"max_weight_mismatches", "max_runtime_kl_excess", "max_block_error_excess"},
    "heads": {"max_weight_mismatches", "max_runtime_kl_excess", "max_block_error_excess"},
    "rope": {"max_runtime_kl_excess", "max_block_error_excess"},
    "layer norm": {"max_weight_mismatches", "max_runtime_kl_excess", "max_mean_kl"},
    "unquantized": {"max_weight_mismatches"},
    "one code": {"max_weight_mismatches"},
    "tokenizer": {"max_tokenizer_mismatches", "max_chat_template_mismatches"},
    "cache": {"max_prefill_decode_kl"},
}
"""Of damages: checks that must fail; others of the row may too."""
READ = (*graphs.ROWS, *(row for row in metadata.ROWS if row.name != "tokenizer"))
"""Damages that reading back alone finds, so that nothing has to run."""


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        pytest.param(kind, row, id=f"{kind}-{row.name}")
        for row in DAMAGES
        for kind in QUICK
        if kind in row.formats and row not in READ and not row.name.endswith("one end token of two")  # this has one
    ],
)
def test_each_damage_fails_the_gate(bench: Bench, kind: Format, row: Damage) -> None:
    try:
        artifact = damaged(bench, kind, row)
        with judged_as(row):
            verdict = bench.judge(artifact)
    except InputError:
        return  # nothing will open it
    assert not verdict.passed
    assert NAMED.get(row.name, set()) <= names(verdict)


@pytest.mark.parametrize(
    ("kind", "row"),
    [pytest.param(kind, row, id=f"{kind}-{row.name}") for row in READ for kind in QUICK if kind in row.formats],
)
def test_each_damage_to_a_file_is_read_back(bench: Bench, kind: Format, row: Damage) -> None:
    assert differing(damaged(bench, kind, row), bench.quantized)


def test_the_matrix_has_damage_for_every_runtime() -> None:
    """benchmarks/gate/command.py does them all."""
    counts = {kind: sum(kind in row.formats for row in DAMAGES) for kind in ALL}
    assert sum(counts.values()) >= 150
    assert min(counts.values()) >= 15, counts


def test_a_float_matrix_is_told_by_its_size_too(bench: Bench) -> None:
    artifact = damage.float_matrix(copied(bench.sound("onnx-cpu"), bench.place("float") / "onnx-cpu"), bench.checkpoint)
    failed = names(bench.judge(artifact))
    assert {"max_weight_mismatches", "max_bits_per_weight_deviation", "max_runtime_kl_excess"} <= failed


def test_a_shifted_tokenizer_is_told_by_the_texts_that_differ(bench: Bench) -> None:
    artifact = damage.shift_tokenizer(copied(bench.sound("onnx-cpu"), bench.place("shifted") / "onnx-cpu"))
    (told,) = [check for check in bench.judge(artifact).failures if check.name == "max_tokenizer_mismatches"]
    assert "and " in told.note
    assert "texts" in str(told)


def test_end_tokens_are_held_against_the_files_that_name_them(bench: Bench) -> None:
    from eval.files.structure import end_token

    source = damage.Changed.of(bench.quantized, eos_token_ids=(7,))
    for kind in ("onnx-genai", "gguf"):
        artifact = bench.artifact(kind, source, "ends")
        with open_runtime(artifact.folder) as runtime:
            figure = end_token(artifact, bench.checkpoint.config, runtime, [1, 2, 3], "cpu")
        assert figure.value >= 1
        assert "artifact.json says [7]" in figure.note


@pytest.mark.parametrize("rotate", [True, False])
def test_a_tied_model_that_was_turned_has_a_head_of_its_own(rotate: bool, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "float", layers=1, tied=True, layer_norm=False, architecture=LLAMA)
    checkpoint = Checkpoint.open(source)
    quantized = rounded(tmp_path / "q", source=source, rotate=rotate)
    assert quantized.config.tie_word_embeddings is not rotate
    artifact = gguf_file.export(quantized, tmp_path / "a", context=CONTEXT)

    def wrong(config: ModelConfig) -> Measurement:
        found = files(artifact, config, checkpoint.tokenizer(), quantized, [], "cpu")
        return next(figure for figure in found if figure.name == "weight_mismatches")

    assert wrong(checkpoint.config).value == 0
    other = wrong(replace(checkpoint.config, rms_norm_eps=1e-3))
    assert other.value == 1 and "the quantized checkpoint's rms_norm_eps" in other.note
