"""What answers in a phone's place is called by its name wherever a figure of it stands; numbers that are none fail."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as Xml
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from safetensors.torch import load_file, save_file

from bluelm.checkpoint import Checkpoint
from bluelm.system.progress import Silent
from eval.files.origin import origin
from eval.heldout import HeldOut
from eval.history import History
from eval.measurement import Measurement
from eval.report import Report
from export.artifacts.artifact import Artifact, Format
from export.formats import Place, records
from export.litert import export as litert
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from pipeline.judge import judging
from targets.runtime import open_runtime
from tests.support.checkpoints import lowered as lowering
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.command_line import QUICK, bluelm

LAX = "max_perplexity_ratio: 2\nmax_mean_kl: 1\nmax_artifact_bytes: 50 MB\nmax_memory_bytes: 1 GB\nstructure: false\n"
SMALL = [word for word in (*QUICK, "--npu-tokens", "512") if word != "--no-bundle"]
NPU = [*QUICK, "--npu-tokens", "512"]
SIMULATOR = f"Qualcomm's HTP simulator on x86, onnxruntime-qnn {version('onnxruntime-qnn')}"
INTERPRETER = f"our interpreter of Core ML programs in NumPy, bluelm-export {version('bluelm-export')}"
# what an artifact's answers give, and what its files alone tell
ANSWERS = re.compile("^(perplexity|p99|.*(_kl|kl_|agreement|divergence|difference|block_|coverage|end_token|position))")
OF_FILES = re.compile(
    "^((tokens|documents)_judged|files_changed|reference_|.*_mismatches|versions_|not_known|bits_per|part_bytes|npu_|delegated)"
)


@dataclass(frozen=True)
class Ran:
    folder: Path
    run: Path
    by: str
    done: CompletedProcess[str]


@pytest.fixture(scope="module", params=["snapdragon", "apple"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_checkpoint(folder / "model")
    (folder / "lax.yaml").write_text(LAX)
    words = ["--target", request.param, "--model", "model", "--budget", "lax.yaml", "--name", "run", *SMALL]
    done = bluelm(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Ran(folder, folder / "dist" / "run", SIMULATOR if request.param == "snapdragon" else INTERPRETER, done)


def test_every_figure_says_whether_the_phone_s_runtime_answered(ran: Ran) -> None:
    figures = Report.open(ran.run).measurements
    of_npu = [m for m in figures if m.subject == "npu"]
    running = [m for m in of_npu if ANSWERS.match(m.name)]
    files = [m for m in of_npu if OF_FILES.match(m.name)]
    assert len(running) >= 20 and {m.name for m in of_npu} == {m.name for m in running} | {m.name for m in files}
    assert not {m.name for m in running} & {m.name for m in files}
    assert all((m.how, m.by) == ("emulated", ran.by) for m in running)
    assert all((m.how, m.by) == ("measured", "") for m in files)
    of_cpu = [m for m in figures if m.subject == "cpu" and m.name == "mean_kl"]
    assert [(m.how, "on this machine" in m.by) for m in of_cpu] == [("measured", True)]
    assert {m.how for m in figures if m.subject == "soc"} == {"estimated"}


def test_every_page_names_what_stood_in(ran: Ran) -> None:
    report = Report.open(ran.run)
    check = next(c for c in report.checks if (c.name, c.subject) == ("max_mean_kl", "npu"))
    told = f"emulated by {ran.by}"
    assert str(check).endswith(told)
    page = (ran.run / "report.html").read_text().replace("&#39;", "'")
    summary = (ran.run / "summary.md").read_text()
    assert f"max_mean_kl (npu)</code> | {told}" in page or told in page
    assert f"† emulated (NPU artifact): {ran.by}" in page
    assert f"† emulated (NPU artifact): {ran.by}" in summary and told in summary
    assert f"† emulated (NPU artifact): {ran.by}" in ran.done.stdout and told in ran.done.stdout
    for text in (summary, ran.done.stdout):
        (row,) = (line for line in text.splitlines() if "mean KL, nats a token" in line)
        npu, cpu = re.split(r"[|│]", row)[2:4]
        assert "†" in npu and "†" not in cpu
    suite = Xml.parse(ran.run / "junit.xml").getroot()[0]
    assert any(told in str(case.findtext("system-out")) for case in suite.findall("testcase"))
    assert any(ran.by in str(p.get("value")) for p in suite.findall("properties/property"))


def test_manifest_and_bill_of_materials_carry_it(ran: Ran) -> None:
    done = bluelm("bundle", ran.run, "--format", "folder", "--out", ran.folder / "packed", cwd=ran.folder)
    assert done.returncode == 0, done.stderr
    (manifest,) = ran.folder.rglob("packed*/**/manifest.json")
    content = json.loads(manifest.read_text())
    kl = next(f for f in content["measurements"] if (f["name"], f["subject"]) == ("mean_kl", "npu"))
    assert (kl["how"], kl["by"]) == ("emulated", ran.by)
    assert any(check.endswith(f"emulated by {ran.by}") for check in content["judgement"]["checks"])
    bom = json.loads((manifest.parent / "mlbom.cdx.json").read_text())
    model = bom["metadata"]["component"]
    slices = {m["slice"] for m in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert f"npu, emulated by {ran.by}" in slices and "npu, measured" in slices


def test_a_budget_may_ask_for_the_phone_s_runtime(ran: Ran) -> None:
    (ran.folder / "strict.yaml").write_text("max_mean_kl: {at_most: 1, accept: [measured]}\nstructure: false\n")
    done = bluelm("check", ran.run, "--budget", "strict.yaml", cwd=ran.folder)
    assert done.returncode == 3
    (failed,) = (line for line in done.stdout.splitlines() if "FAIL" in line and "max_mean_kl" in line)
    assert f"(npu): not measured (only emulated by {ran.by}: " in failed
    assert "ok   max_mean_kl (cpu)" in done.stdout


def test_the_speed_of_a_tiny_model_is_not_known(ran: Ran) -> None:
    assert not [m for m in Report.open(ran.run).measurements if (m.subject, m.unit) == ("soc", "tokens/s")]
    told = r"not known, NPU artifact: the speed on the phone: nothing is published of models below 0\.5 B parameters"
    assert re.search(told, ran.done.stdout)
    assert re.search(told.removeprefix("not known, "), (ran.run / "junit.xml").read_text())
    for page in ("report.html", "summary.md"):
        assert "below 0.5 B parameters" in (ran.run / page).read_text()
    (ran.folder / "fast.yaml").write_text("min_decode_tokens_per_s: {at_least: 1, accept: [measured, estimated]}\n")
    done = bluelm("check", ran.run, "--budget", "fast.yaml", cwd=ran.folder)
    assert done.returncode == 3
    assert "FAIL min_decode_tokens_per_s (soc): not measured" in done.stdout


def test_every_place_that_an_artifact_runs_at_is_the_runtime_or_a_stand_in() -> None:
    places = {(kind.name, on): run for kind in records().values() for on, run in kind.runs.items()}
    on_a_mac = {(kind, on) for kind in ("coreml", "executorch-coreml") for on in ("cpu", "gpu", "ane")} | {
        ("mlx", "gpu")
    }
    itself = {
        (kind, "cpu") for kind in ("onnx-cpu", "onnx-genai", "executorch-xnnpack", "litert", "litert-lm")
    } | on_a_mac
    assert {place for place, run in places.items() if not run.stands_in} == itself


@pytest.mark.parametrize("export", [onnx_cpu.export, onnx_genai.export, litert.export])
def test_what_is_measured_names_the_program_that_answered(export: Callable[..., Artifact], tmp_path: Path) -> None:
    """onnxruntime runs the graph of onnxruntime-genai, which need not be installed for it."""
    artifact = export(lowering.quantized(), tmp_path / "a", context=lowering.CONTEXT, chunk=lowering.CHUNK)
    found = origin(artifact, "cpu")
    program, _, rest = found.by.partition(" on this machine, ")
    with open_runtime(artifact.folder) as runtime:
        assert runtime.name == f"{artifact.format} in {program}"
    assert found.how == "measured" and rest


@pytest.mark.parametrize(("kind", "on"), [("gguf", "cpu"), ("coreml", "interpreter"), ("onnx-npu", "cpu")])
def test_the_speed_of_a_stand_in_is_not_measured_and_the_report_says_so(
    tmp_path: Path, kind: Format, on: Place
) -> None:
    model = Checkpoint.open(tiny_checkpoint(tmp_path / "model")).config
    artifact = Artifact.model_construct(format=kind, model=model, context=64, parameters=1000)
    subject = judging.Subject("cpu", artifact, on, 1)
    held_out = HeldOut((), "", "", 1)
    assert judging.speed(subject, held_out, Silent()) == []
    told = judging.not_known([subject], [])["cpu"]
    (said,) = (text for text in told if "tokens/s on this machine: not measured here" in text)
    assert records()[kind].runs[on].stands_in in said
    plain = judging.not_known(
        [replace(subject, artifact=artifact.model_copy(update={"format": "onnx-cpu"}), on="cpu")], []
    )
    assert not [text for text in plain["cpu"] if "on this machine" in text]


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model whose stream goes beyond float16: its embedding is 50,000 times as large."""
    folder = tmp_path_factory.mktemp("beyond")
    path = tiny_checkpoint(folder / "model") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_layer_norm.weight"] *= 5e4
    tensors["model.embed_layer_norm.bias"] *= 5e4
    save_file(tensors, path)
    (folder / "lax.yaml").write_text(LAX)
    yield folder


def test_a_stream_beyond_float16_fails_its_figures_and_names_the_remedy(beyond: Path) -> None:
    words = ["--target", "apple", "--model", "model", "--budget", "lax.yaml", "--name", "narrow", *NPU]
    done = bluelm(*words, cwd=beyond)
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    failed = [line for line in lines if "FAIL" in line]
    assert any("max_mean_kl (npu): the figure is nan" in line for line in failed)
    assert all("--activation-bits 32" in line for line in failed if "the figure is nan" in line)
    run = beyond / "dist" / "narrow"

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    told = json.loads((run / "report.json").read_text(), parse_constant=refuse)
    report = Report.open(run)
    kl = next(m for m in report.measurements if (m.name, m.subject) == ("mean_kl", "npu"))
    assert math.isnan(kl.value) and any(m["value"] == "NaN" for m in told["measurements"])
    assert any(math.isnan(value) for value in report.documents["npu"].kl)
    for page in ("report.html", "summary.md", "junit.xml"):
        assert "the figure is nan" in (run / page).read_text()

    again = bluelm(*words, cwd=beyond)  # nothing is judged anew, and what was written is read
    assert again.returncode == 3 and "judged: unchanged" in again.stderr
    assert bluelm("check", run, "--baseline", run, cwd=beyond).returncode == 3
    assert bluelm("report", run, cwd=beyond).returncode == 0
    shown = bluelm("history", "--metric", "mean_kl", cwd=beyond)
    assert shown.returncode == 0 and "nan" in shown.stdout, shown.stderr

    wide = bluelm(*words[: -len(NPU) - 1], "wide", *NPU, "--activation-bits", "32", cwd=beyond)
    assert wide.returncode == 0, wide.stdout + wide.stderr


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_history_keeps_what_is_no_number(tmp_path: Path, value: float) -> None:
    from eval.history import KeptRun

    figure = Measurement("x", value, "", "emulated", math.inf, None, "", "npu", -math.inf, math.inf, "a simulator")
    history = History(tmp_path / "h.sqlite")
    history.append(KeptRun("t", "x", False, (figure,)))
    (kept,) = history.runs()[0].measurements
    assert repr(kept) == repr(figure)
