"""Runtimes held against each other: damage is located in an artifact of each, and sound ones are in range."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from compress.checkpoint.store import QuantizedCheckpoint
from eval.accuracy.compare import Side, block_errors, compare, weights_steps
from export.artifacts.artifact import Artifact
from export.artifacts.debug import debug_build
from export.coreml import export as coreml
from export.executorch import held as executorch_held
from export.executorch import xnnpack as executorch
from export.gguf import export as gguf_file
from export.litert import export as litert
from export.lowering.ranges import Ranges, calibrate
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.onnx import npu as onnx_npu
from pipeline.cli import app
from pipeline.report import compare_report
from targets.block_outputs import open_blocks
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import Place, open_runtime
from tests.packages import requires
from tests.support.checkpoints.rounded import Damaged, linear_names, rounded
from tests.support.checkpoints.shapes import tiny_checkpoint

CONTEXT, CHUNK, HURT = 128, 64, 3
TOKENS = np.random.default_rng(2).integers(5, 6000, 48).tolist()
KINDS = [
    ("onnx-cpu", "cpu"),
    ("onnx-npu", "cpu"),
    pytest.param("onnx-npu", "htp", marks=requires("libatomic1")),
    ("litert", "cpu"),
    ("onnx-genai", "cpu"),
    ("gguf", "cpu"),
    ("coreml", "interpreter"),
]
Maker = Callable[[str, bool], Artifact]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("q") / "quantized")


@pytest.fixture(scope="module")
def reference(demo: QuantizedCheckpoint) -> Side:
    steps = weights_steps(demo, CONTEXT)
    return Side("torch", "dequantized", TorchRuntime(demo, CONTEXT), steps, demo, demo.digest())


@pytest.fixture(scope="module")
def made(demo: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Artifacts by format, sound or with one block's scales times 1.05; each made once."""
    folder, kept = tmp_path_factory.mktemp("artifacts"), {}
    ranges: list[Ranges] = []

    def make(kind: str, hurt: bool) -> Artifact:
        if (kind, hurt) not in kept:
            source = Damaged.of(demo, HURT) if hurt else demo
            target = folder / f"{kind}-{hurt}"
            if kind == "onnx-npu" and not ranges:
                ranges.append(calibrate(demo, torch.tensor([TOKENS])))
            kept[kind, hurt] = {
                "onnx-cpu": lambda: onnx_cpu.export(source, target, context=CONTEXT, chunk=CHUNK),
                "onnx-npu": lambda: onnx_npu.export(source, ranges[0], target, context=CONTEXT, chunk=CHUNK),
                "onnx-genai": lambda: onnx_genai.export(source, target, context=CONTEXT, accuracy_level=4),
                "gguf": lambda: gguf_file.export(source, target, context=CONTEXT),
                "litert": lambda: litert.export(source, target, context=CONTEXT, chunk=CHUNK),
                "coreml": lambda: coreml.export(source, target, context=CONTEXT, chunk=CHUNK),
            }[kind]()
        return kept[kind, hurt]

    return make


@pytest.mark.parametrize(("kind", "on"), KINDS)
def test_a_damaged_block_is_named_on_every_runtime(
    demo: QuantizedCheckpoint, reference: Side, made: Maker, tmp_path: Path, kind: str, on: Place
) -> None:
    for hurt in (False, True):
        with open_blocks(made(kind, hurt), on, tmp_path / str(hurt)) as runtime:
            subject = Side(kind, kind, runtime, lambda t, r=runtime: r.blocks(list(t)), digest=demo.digest())
            found = block_errors(reference, subject, TOKENS)
        assert found.local and len(found.errors) == demo.config.num_layers
        assert found.first_outside == (HURT if hurt else None), found


def test_a_damaged_block_is_named_in_an_executorch_program(tmp_path: Path) -> None:
    """One lowering, of a tiny model and with its blocks shown: what `open_blocks` builds around the weights that it
    reads from a program. The demo's six blocks take minutes (benchmarks/accuracy/block_damage.md has them)."""
    q = rounded(tmp_path / "q", source=tiny_checkpoint(tmp_path / "tiny"))
    hurt = Damaged.of(q, 1)
    made = executorch.export(hurt, tmp_path / "pte", context=32, chunk=16, debug=True)
    found = executorch_held.held(made.path("model"), q)
    for name in linear_names(q):
        assert torch.equal(found.linear(name).codes, q.linear(name).codes)
        assert torch.equal(found.linear(name).scales, hurt.linear(name).scales)
    steps = weights_steps(q, 32)
    reference = Side("torch", "dequantized", TorchRuntime(q, 32), steps, q, q.digest())
    with open_blocks(made, "cpu", tmp_path / "scratch") as runtime:
        subject = Side("pte", made.format, runtime, lambda t: runtime.blocks(list(t)), digest=q.digest())
        assert block_errors(reference, subject, TOKENS[:20]).first_outside == 1


def test_weights_of_a_program_go_to_the_linears_that_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = rounded(tmp_path / "q", source=tiny_checkpoint(tmp_path / "tiny"))
    names = linear_names(q)
    linears = [q.linear(name) for name in names]
    other = linears[9].codes.clone()
    other[0, :3] = 15 - other[0, :3]
    linears[9] = replace(linears[9], codes=other, scales=linears[9].scales * 2)
    contents = SimpleNamespace(linears=tuple(reversed(linears)))
    monkeypatch.setattr(executorch_held, "read", lambda path: contents)
    found = executorch_held.held(tmp_path / "x.pte", q)
    for name, linear in zip(names, linears, strict=True):
        assert torch.equal(found.linear(name).codes, linear.codes)
        assert torch.equal(found.linear(name).scales, linear.scales)
    contents.linears = contents.linears[1:]
    with pytest.raises(InputError, match="no weight of the shape of lm_head"):
        executorch_held.held(tmp_path / "x.pte", q)


def test_a_twin_that_answers_otherwise_cannot_speak_for_the_artifact(
    demo: QuantizedCheckpoint, reference: Side
) -> None:
    other, own = TorchRuntime(Damaged.of(demo, HURT), CONTEXT), reference.runtime
    for twin, same in ((own.logits, True), (other.logits, False)):
        subject = replace(reference, name="a", twin=twin)
        assert block_errors(reference, subject, TOKENS).same_twin is same
    found = compare(reference, [replace(reference, twin=other.logits)], [TOKENS], [], block_window=TOKENS)
    shown = io.StringIO()
    compare_report.show("torch", found, Console(file=shown, width=200))
    assert "answers otherwise than the artifact" in shown.getvalue()


def test_two_artifacts_alone_locate_it_too(demo: QuantizedCheckpoint, made: Maker, tmp_path: Path) -> None:
    """Without the weights at hand errors of earlier blocks are included; the first outside is the same."""
    with (
        open_blocks(made("onnx-cpu", False), "cpu", tmp_path / "a") as sound,
        open_blocks(made("coreml", True), "interpreter", tmp_path / "b") as hurt,
    ):
        subjects = [
            Side(kind, kind, r, lambda t, r=r: r.blocks(list(t)), digest=demo.digest())
            for kind, r in (("onnx-cpu", sound), ("coreml", hurt))
        ]
        found = block_errors(subjects[0], subjects[1], TOKENS)
    assert not found.local
    assert found.first_outside == HURT


def test_against_the_float_model_quantization_is_expected_and_damage_is_not(
    demo: QuantizedCheckpoint, made: Maker, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    steps = weights_steps(checkpoint, CONTEXT)
    reference = Side("float", "float", TorchRuntime(checkpoint, CONTEXT), steps, checkpoint)
    for hurt in (False, True):
        with open_blocks(made("coreml", hurt), "interpreter", tmp_path / str(hurt)) as runtime:
            subject = Side("a", "coreml", runtime, lambda t, r=runtime: r.blocks(list(t)), digest=demo.digest())
            assert block_errors(reference, subject, TOKENS).first_outside == (HURT if hurt else None)


def test_the_same_runtime_twice_differs_in_nothing(reference: Side, demo: QuantizedCheckpoint) -> None:
    other = Side("again", "dequantized", TorchRuntime(demo, CONTEXT), digest=demo.digest())
    (found,) = compare(reference, [other], [TOKENS], [TOKENS[:8], TOKENS[8:20]], 16)
    assert found.kl.value == 0 and found.top1.value == 1 and found.largest_kl == 0
    assert [(d.at, d.length) for d in found.divergences] == [(None, 16), (None, 16)]


def test_the_first_diverging_token_is_where_free_generation_parts(reference: Side, demo: QuantizedCheckpoint) -> None:
    """Worked out independently: both generate on their own, and the texts are compared."""
    hurt = Damaged.of(demo, 0)
    subject = Side("hurt", "dequantized", TorchRuntime(hurt, CONTEXT), digest="other")
    prompts = [TOKENS[:6], TOKENS[6:16], TOKENS[16:26]]
    (found,) = compare(reference, [subject], [TOKENS], prompts, 24)
    for prompt, divergence in zip(prompts, found.divergences, strict=True):
        texts = []
        for runtime in (reference.runtime, subject.runtime):
            row, text = runtime.logits(prompt)[-1], []
            for _ in range(24):
                text.append(int(row.argmax()))
                row = runtime.decode(text[-1])
            texts.append(text)
        apart = [i for i in range(24) if texts[0][i] != texts[1][i]]
        assert divergence.at == (apart[0] if apart else None)
        if apart:
            assert (divergence.expected, divergence.found) == (texts[0][apart[0]], texts[1][apart[0]])
    assert any(d.at is not None for d in found.divergences)


def test_other_models_and_closed_artifacts_are_refused(reference: Side, made: Maker, tmp_path: Path) -> None:
    closed = Side("closed", "onnx-cpu", open_runtime(made("onnx-cpu", False).folder))
    with pytest.raises(InputError, match="closed cannot show the output of its blocks"):
        block_errors(reference, closed, TOKENS)
    with pytest.raises(InputError, match="does not show its blocks"):
        open_runtime(made("onnx-cpu", False).folder).blocks(TOKENS)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="cannot be opened up"):
        debug_build(made("coreml", False), tmp_path / "d")
    other = TorchRuntime(Checkpoint.open(demo_checkpoint()), CONTEXT)
    other.vocab_size = 7
    with pytest.raises(InputError, match="not of the same model"):
        compare(reference, [Side("other", "float", other)], [TOKENS], [])


def test_a_debug_build_answers_as_the_artifact(made: Maker, tmp_path: Path) -> None:
    plain = made("onnx-cpu", False)
    opened = debug_build(plain, tmp_path / "d")
    opened.verify()
    with open_runtime(plain.folder) as a, open_runtime(opened.folder) as b:
        np.testing.assert_allclose(a.logits(TOKENS), b.logits(TOKENS), atol=1e-5)


def test_the_command_shows_a_table_and_writes_figures_and_a_plot(
    demo: QuantizedCheckpoint, made: Maker, tmp_path: Path
) -> None:
    folders = [str(demo.folder), str(made("onnx-cpu", False).folder), str(made("coreml", True).folder)]
    options = ["--tokens", "96", "--prompts", "1", "--length", "8", "--blocks"]
    written = ["--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "p.png")]
    result = CliRunner().invoke(app, ["compare", *folders, *options, *written])
    assert result.exit_code == 0, result.output
    assert "block 3 is the first that does not lie within the expected" in result.output
    figures = json.loads((tmp_path / "f.json").read_text())
    sound, hurt = figures["compared"]
    assert sound["blocks"]["first_outside"] is None and hurt["blocks"]["first_outside"] == HURT
    assert sound["kl"]["value"] < 1e-6 < hurt["kl"]["value"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{demo}"], "two folders or more"),
        (["{demo}", "/nowhere"], "no such folder"),
        (["{demo}", "{demo}@moon"], "unknown place 'moon'"),
        (["{demo}", "{empty}"], "neither artifact nor run nor checkpoint"),
        (["{demo}", "{cpu}@htp"], "does not run on 'htp'"),
        (
            ["{demo}", "{cpu}", "--plot", "x.doc", "--tokens", "50", "--prompts", "0"],
            "not a supported image format",
        ),
    ],
)
def test_the_command_refuses_what_it_cannot_compare(
    demo: QuantizedCheckpoint, made: Maker, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    places = {"demo": demo.folder, "empty": tmp_path, "cpu": made("onnx-cpu", False).folder}
    result = CliRunner().invoke(app, ["compare", *(a.format(**places) for a in arguments)])
    assert result.exit_code == 2
    assert problem in result.output
