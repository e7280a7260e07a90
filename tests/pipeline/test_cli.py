"""The command line end to end, in processes of its own: a tiny checkpoint, real runtimes."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bluelm.errors import InputError
from bluelm.text.clean import clean
from bluelm.text.tokenizer import Tokenizer
from compress.recipe import Recipe
from eval.report import Report
from pipeline.cli import main, spread_lists
from pipeline.commands import generate
from pipeline.errors import crash, guard
from pipeline.run.plan import Request, make_plan
from tests.packages import requires
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.command_line import LAX, QUICK, bluelm, command, environment


@dataclass(frozen=True)
class Place:
    """A folder with a model, a lax budget and, below dist/, a finished run."""

    folder: Path
    run: Path
    first: subprocess.CompletedProcess[str]

    def export(self, *more: str | Path) -> subprocess.CompletedProcess[str]:
        return bluelm(*self.arguments(), *more, cwd=self.folder)

    @staticmethod
    def arguments() -> list[str]:
        return ["--target", "generic-arm64", "--model", "model", "--budget", "lax.yaml", "--name", "tiny", *QUICK]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    tiny_checkpoint(folder / "model")
    (folder / "lax.yaml").write_text(LAX)
    first = bluelm(*Place.arguments(), cwd=folder)
    return Place(folder, folder / "dist" / "tiny", first)


def test_a_run_passes_and_tells_plainly(place: Place) -> None:
    assert place.first.returncode == 0, place.first.stderr
    assert "PASSED" in place.first.stdout
    assert place.first.stdout.index("PASSED") < place.first.stdout.index("Accuracy")
    assert "quantize" in place.first.stderr
    assert re.search(r"Planned [0-9.]+ GB of memory and [0-9]+ s; it took [0-9.]+ GB \([0-9]+% ", place.first.stderr)
    assert "\x1b" not in place.first.stdout + place.first.stderr
    assert sorted(p.name for p in place.run.iterdir() if p.is_dir() and p.name[0] != ".") == [
        "judged",
        "onnx-genai",
        "quantized",
    ]


def test_the_report_says_what_how_and_from_what(place: Place) -> None:
    report = Report.open(place.run)
    assert report.passed
    assert report.configuration["recipe"]["method"] == "gptq"
    assert set(report.inputs) >= {"checkpoint", "calibration", "evaluation", "quantized"}
    assert all(len(digest) == 64 for digest in report.inputs.values())
    assert report.versions["onnxruntime"][0].isdigit()
    figures = {(m.name, m.subject): m for m in report.measurements}
    assert figures["mean_kl", "cpu"].how == "measured"
    assert figures["mean_kl", "cpu"].error is not None
    assert figures["memory_bytes", "soc"].how == "estimated"
    assert figures["tokens_judged", "cpu"].value >= 512
    shipped = json.loads((place.run / "onnx-genai" / "artifact.json").read_text())["files"]
    assert figures["artifact_bytes", "files"].value == sum(f["bytes"] for f in shipped)


def test_a_second_run_reuses_every_stage_and_a_failed_budget_exits_3(place: Place) -> None:
    strict = place.folder / "strict.yaml"
    strict.write_text("max_mean_kl: 1.0e-9\nmin_decode_tokens_per_s: {at_least: 1, where: soc}\n")
    again = place.export("--budget", "strict.yaml")
    assert again.returncode == 3
    for stage in ("quantized", "onnx-genai", "judged"):
        assert f"{stage}: unchanged" in again.stderr
    assert "FAILED" in again.stdout
    assert "FAIL max_mean_kl (cpu)" in again.stdout
    assert "at most 1e-09" in again.stdout
    assert "beyond by" in again.stdout
    assert "min_decode_tokens_per_s (soc): not measured" in again.stdout
    assert all(stage.reused for stage in Report.open(place.run).stages)


def test_check_holds_a_run_against_another_budget(place: Place) -> None:
    good = bluelm("check", place.run, "--budget", "lax.yaml", cwd=place.folder)
    assert good.returncode == 0, good.stderr
    (place.folder / "small.yaml").write_text("max_artifact_bytes: 10 KB")
    bad = bluelm("check", place.run, "--budget", "small.yaml", cwd=place.folder)
    assert bad.returncode == 3
    assert "max_artifact_bytes (files)" in bad.stdout


def test_other_settings_in_a_folder_ask_for_overwrite(place: Place) -> None:
    before = (place.run / "report.json").read_bytes()
    refused = place.export("--context", "256")
    assert refused.returncode == 2
    assert "context 512 (now 256)" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert (place.run / "report.json").read_bytes() == before


def test_default_names_say_what_makes_another_artifact(place: Place) -> None:
    """One name for one set of settings; what a name does not say in words is a digest in it."""

    def name(runtime: str | None = None, context: int = 512, **values: Any) -> str:
        recipe = Recipe.load("w4-g32", **{"samples": 4, "length": 64, **values})
        request = Request(
            "generic-arm64", None, runtime, place.folder / "model", Path("dist"), None, recipe, (), context, (), 512,
            256, None,
        )  # fmt: skip
        return make_plan(request).folder.name

    plain = name(samples=128, length=512)
    assert plain == "model-gptq-w4-g32-generic-arm64"
    others = [name(), name("gguf"), name(context=256), name(seed=3), name(bits=8), name(head_bits=4), name(samples=5)]
    assert len({plain, *others}) == 1 + len(others)
    assert others[1].startswith("model-gptq-w4-g32-generic-arm64-gguf-")


def test_generate_answers_the_same_twice(place: Place) -> None:
    options = ("--prompt", "你好，world", "--max-tokens", "12", "--temperature", "0.7", "--seed", "5")
    first, second = (bluelm("generate", place.run, *options, cwd=place.folder) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.strip()


@pytest.mark.parametrize("said", ("::error::owned\n##[group]x", "hi\n :", "a\n\n::stop-commands::x\x1b[2Jy"))
def test_an_answer_steers_no_ci_system(
    said: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens are chosen so that the model says it, a token at a time; what stays of it reads as it was."""
    tokens = Tokenizer.from_folder(place.run / "onnx-genai").encode(said, bos=False)
    chosen = iter(tokens)
    monkeypatch.setattr(generate, "pick", lambda logits, temperature, generator: next(chosen))
    generate.answer(place.run, "x", on="cpu", chat=False, max_tokens=len(tokens), temperature=0, seed=0)
    shown = capsys.readouterr().out
    assert len(tokens) > 3 and shown.strip() == clean(said).strip()
    assert not any(line.lstrip().startswith("::") or "##[" in line or "\x1b" in line for line in shown.splitlines())


def test_generate_says_what_it_cannot(place: Place) -> None:
    there_is_none = bluelm("generate", place.run, "--prompt", "a", "--on", "htp", cwd=place.folder)
    assert there_is_none.returncode == 2
    assert "--on cpu" in there_is_none.stderr
    too_long = bluelm("generate", place.run, "--prompt", "one two " * 600, cwd=place.folder)
    assert too_long.returncode == 2
    assert "context holds 512" in too_long.stderr


def test_a_dry_run_writes_nothing(place: Place) -> None:
    done = place.export("--dry-run", "--out", "elsewhere")
    assert done.returncode == 0, done.stderr
    assert "quantized" in done.stdout
    assert not (place.folder / "elsewhere").exists()


def test_a_users_files_where_artifacts_go_are_told_of_before_any_work(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    mine = place.folder / "mine" / "tiny" / "onnx-genai" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(SystemExit) as left:
        main([*place.arguments(), "--out", "mine"])
    assert left.value.code == 2 and "did not write: notes.txt" in capsys.readouterr().err
    assert [path for path in (place.folder / "mine").rglob("*") if path.is_file()] == [mine]


def test_interrupted_runs_exit_6_and_go_on(place: Place) -> None:
    arguments = [*place.arguments(), "--samples", "64", "--name", "broken-off"]
    with subprocess.Popen(
        command(*arguments),
        cwd=place.folder,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(place.folder),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    ) as process:
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told += line
            if line.startswith("quantize ..."):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 6, told
    assert "interrupted" in told
    assert "Traceback" not in told
    resumed = bluelm(*arguments, cwd=place.folder)
    assert resumed.returncode == 0, resumed.stderr
    assert Report.open(place.folder / "dist" / "broken-off").passed


@requires("libatomic1")
def test_snapdragon_end_to_end(place: Place) -> None:
    """Compiled, run on Qualcomm's simulator, judged, and answering."""
    target = ["--target", "snapdragon", "--model", "model", "--budget", "lax.yaml", "--context", "160", "--name", "npu"]
    target += ["--npu-tokens", "512"]
    done = bluelm(*target, *QUICK, cwd=place.folder)
    assert done.returncode == 0, done.stderr + done.stdout
    run = place.folder / "dist" / "npu"
    report = Report.open(run)
    figures = {(m.name, m.subject): m.value for m in report.measurements}
    assert list(report.artifacts) == ["npu", "cpu"]
    assert figures["tokens_judged", "npu"] >= 512
    assert figures["mean_kl", "npu"] < 1.3 * figures["mean_kl", "cpu"] + 0.01
    assert figures["prefill_decode_kl", "npu"] < 1e-3
    nodes = report.details["artifacts"]["npu"]["nodes"]
    assert nodes
    assert all(graph["on_npu"] > 0 for graph in nodes.values())
    answer = bluelm("generate", run, "--prompt", "a", "--on", "htp", "--max-tokens", "2", cwd=place.folder)
    assert answer.returncode == 0, answer.stderr
    assert "(emulated by Qualcomm's HTP simulator on x86, onnxruntime-qnn" in answer.stderr


def test_an_unexpected_error_leaves_its_traceback_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        guard(lambda: 1 // 0, resume="")
    except ZeroDivisionError as error:
        crash(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    path = Path(told.split("the traceback is in ")[1].splitlines()[0])
    assert "ZeroDivisionError" in path.read_text()
    path.unlink()


def test_errors_become_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    def bad() -> int:
        raise InputError("bad", where="there", fix="correct it")

    assert guard(interrupted, resume="bluelm-export --again") == 6
    assert guard(bad, resume="") == 2
    told = capsys.readouterr().err
    assert "bluelm-export --again" in told
    assert "where: there" in told


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO), "/x"),
        OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
        OSError(errno.EFBIG, os.strerror(errno.EFBIG), "/x"),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/x"),
        RuntimeError("Symlink loop from '/x'"),
    ],
)
def test_what_a_machine_refuses_is_no_internal_error(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise error

    assert guard(work, resume="") == 2
    assert "fix:" in capsys.readouterr().err


@pytest.mark.linux  # /dev/full
def test_a_log_that_finds_the_disk_full_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.FileHandler("/dev/full")
    log = logging.getLogger("bluelm_export")
    log.addHandler(handler)
    try:
        log.error("what is told")
    finally:
        log.removeHandler(handler)
        handler.stream = None  # closing it would write again
    assert "Traceback" not in capsys.readouterr().err


def test_lists_behind_an_option() -> None:
    given = ["--calibration", "a", "b", "--bits", "4", "--eval", "c", "--budget", "d"]
    expected = ["--calibration", "a", "--calibration", "b", "--bits", "4", "--eval", "c", "--budget", "d"]
    assert spread_lists(given) == expected


def test_a_working_folder_that_was_removed_is_told(tmp_path: Path) -> None:
    """torch's libraries would end the process in words of their own."""
    code = f"import os; os.rmdir({str(tmp_path / 'gone')!r}); from pipeline.cli import main; main(['targets'])"
    (tmp_path / "gone").mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "gone", capture_output=True, text=True, env=environment(tmp_path)
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert "was removed" in ended.stderr and "oneMKL" not in ended.stderr


@pytest.mark.parametrize("where", ["show_warnings", "hold_to_bounds"])
def test_a_signal_before_a_command_begins_is_an_interruption(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pipeline.cli.{where}", stop)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    with pytest.raises(SystemExit) as left:
        main(["targets"])
    assert left.value.code == 6 and "interrupted" in capsys.readouterr().err
