"""Finished artifacts judged as they lie there; verdicts that stay with what they judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.report import Report
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.command_line import LAX, QUICK, bluelm, call

TEXT = ["--eval-tokens", "512"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another one, a lax budget, and a finished run in dist/run."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_checkpoint(folder / "model")
    tiny_checkpoint(folder / "other", seed=1)
    (folder / "lax.yaml").write_text(LAX)
    run = ["--target", "generic-arm64", "--runtime", "onnx-cpu", "--model", "model", "--budget", "lax.yaml"]
    done = bluelm(*run, "--name", "run", *QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that a test may hurt."""
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    yield tmp_path / "place"


def flip(path: Path, at: int = -100) -> None:
    """Change one bit of a file, its size and name kept."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def weights(run: Path) -> Path:
    return max((run / "onnx-cpu").iterdir(), key=lambda path: path.stat().st_size)


def test_a_run_is_judged_again_as_it_lies_there(place: Path) -> None:
    run = place / "dist" / "run"
    before = {(m.name, m.subject): m.value for m in Report.open(run).measurements}
    done = bluelm("evaluate", run, cwd=place)
    assert done.returncode == 0, done.stderr + done.stdout
    after = {(m.name, m.subject): m.value for m in Report.open(run).measurements}
    assert after["mean_kl", "cpu"] == pytest.approx(before["mean_kl", "cpu"], rel=1e-6)
    assert (run / "previous" / "report.json").is_file()
    assert bluelm("check", run, cwd=place).returncode == 0


def test_a_changed_artifact_is_told_apart_and_fails(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` and the others refuse a report of other files; `evaluate`, which they name, judges what is there."""
    run, sound, history = place / "dist" / "run", place / "dist" / "sound", place / "history.sqlite"
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    shutil.copytree(run, sound)
    flip(weights(run))
    commands = (
        ["check", run],
        ["check", sound, "--baseline", run],
        ["generate", run, "--prompt", "a"],
        ["bundle", run, "--format", "folder"],
        ["report", run],
        ["compare", sound, run],
        ["count", run, "--history", history],
        ["measure", run, "--device", "adb", "--history", history],
    )
    for command in commands:
        assert call(*command) == 2, command
        said = capsys.readouterr().err
        assert "was changed" in said, command
        assert f"bluelm-export evaluate {run}" in said
    assert not history.exists()
    assert call("report", sound) == 0
    judged = bluelm("evaluate", run, cwd=place)
    assert judged.returncode == 3, judged.stderr
    assert "max_files_changed (cpu): 1 files, at most 0 files" in judged.stdout
    assert "FAIL max_weight_mismatches" in judged.stdout or "FAIL max_runtime_kl_excess" in judged.stdout
    assert not Report.open(run).passed


def test_an_artifact_by_itself(place: Path) -> None:
    """From a colleague: with what it was made of, with the float checkpoint alone, with nothing."""
    run, alone = place / "dist" / "run", place / "theirs"
    shutil.copytree(run / "onnx-cpu", alone)
    whole = ["--reference", "model", "--quantized", run / "quantized", "--budget", "lax.yaml", *TEXT]
    done = bluelm("evaluate", alone, *whole, "--report", "out", cwd=place)
    assert done.returncode == 0, done.stderr + done.stdout
    report = Report.open(place / "out")
    assert report.passed
    assert {m.name for m in report.measurements} >= {"mean_kl", "weight_mismatches", "runtime_kl", "files_changed"}
    without = bluelm("evaluate", alone, "--reference", "model", "--budget", "lax.yaml", *TEXT, cwd=place)
    assert "the quantized checkpoint that it was made of is not at hand" in without.stdout
    assert "mean KL" in without.stdout
    nothing = bluelm("evaluate", alone, cwd=place)
    assert nothing.returncode == 2
    assert "--reference" in nothing.stderr


def test_what_does_not_belong_together_is_refused(place: Path) -> None:
    run = place / "dist" / "run"
    other = bluelm("evaluate", run, "--reference", "other", cwd=place)
    assert other.returncode == 2
    assert "not the checkpoint that the codes were chosen for" in other.stderr
    info = json.loads((run / "onnx-cpu" / "artifact.json").read_text())
    info["quantized_digest"] = "0" * 64
    (run / "onnx-cpu" / "artifact.json").write_text(json.dumps(info))
    odd = bluelm("evaluate", run, cwd=place)
    assert odd.returncode == 2
    assert "not the quantized checkpoint that the artifact was made of" in odd.stderr
    for path in ("model", "nowhere"):
        assert bluelm("evaluate", place / path, cwd=place).returncode == 2


def test_an_edited_report_is_refused(place: Path) -> None:
    """A verdict turned round, with and without the note of the report's digest."""
    run = place / "dist" / "run"
    path = run / "report.json"
    report = json.loads(path.read_text())
    report["budget"]["max_mean_kl"] = 1e-12
    path.write_text(json.dumps(report))
    changed = bluelm("bundle", run, "--format", "folder", cwd=place)
    assert changed.returncode == 2
    assert "report.json was changed after the run" in changed.stderr
    (run / ".stages" / "report").unlink()
    again = bluelm("bundle", run, "--format", "folder", cwd=place)
    assert again.returncode == 2
    assert "the report says passed, its own figures do not: max_mean_kl" in again.stderr


def test_a_report_by_itself_says_what_it_is_about(place: Path) -> None:
    """CI keeps reports without artifacts."""
    (place / "kept").mkdir()
    shutil.copy(place / "dist" / "run" / "report.json", place / "kept")
    done = bluelm("check", place / "kept", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "The cpu artifact is not here" in done.stdout
