"""`bluelm-export history` as a user types it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from eval.history import History, KeptRun
from eval.measurement import Measurement
from pipeline.commands import history as history_commands
from pipeline.commands.history import bars

app = typer.Typer()
history_commands.register(app)
app.command()(lambda: None)  # a second command, so that the first keeps its name


def ask(*arguments: str):
    return CliRunner().invoke(app, ["history", *arguments], catch_exceptions=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    history = History(tmp_path / "h.sqlite")
    for value in (10.0, 12.0, 11.0):
        figure = Measurement(
            "decode_tokens_per_s",
            value,
            "tokens/s",
            "measured",
            subject="host",
            low=value - 1,
            high=value + 1,
        )
        history.append(KeptRun("demo w4", "snapdragon (sm8650)", value > 10, (figure,)))
    return history.path


def test_lists_runs(path):
    result = ask("--history", str(path))
    lines = result.output.splitlines()
    assert result.exit_code == 0 and len(lines) == 2 + 3
    assert "FAILED" in lines[2] and "passed" in lines[3] and "demo w4" in lines[4]


def test_lists_and_plots_a_figure(path, tmp_path):
    drawn = tmp_path / "speed.png"
    result = ask("--history", str(path), "--metric", "decode_tokens_per_s", "--plot", str(drawn))
    assert result.exit_code == 0
    assert "11 to 13" in result.output and "▁█▅  10 to 12  demo w4" in result.output
    assert drawn.read_bytes().startswith(b"\x89PNG")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for drawn in (first, second):
        ask("--history", str(path), "--metric", "decode_tokens_per_s", "--plot", str(drawn))
    assert first.read_bytes() == second.read_bytes()


def test_a_figure_that_is_no_number_is_listed_and_not_drawn(path, tmp_path):
    for value in (math.nan, math.inf):
        figure = Measurement("decode_tokens_per_s", value, "tokens/s", "measured", subject="host", low=1, high=2)
        History(path).append(KeptRun("demo w4", "snapdragon (sm8650)", False, (figure,), {"details": [math.nan]}))
    drawn = tmp_path / "speed.svg"
    result = ask("--history", str(path), "--metric", "decode_tokens_per_s", "--plot", str(drawn))
    assert result.exit_code == 0 and "  nan  " in result.output and "  inf  " in result.output
    assert "▁█▅??" in result.output and drawn.stat().st_size > 1000
    assert History(path).runs()[-1].facts == {"details": ["NaN"]}


def test_last_and_accept(path):
    assert len(ask("--history", str(path), "--last", "1").output.splitlines()) == 3
    ask("--history", str(path), "--reject", "3")
    best = History(path).last_accepted("demo w4")
    assert best is not None and best.id == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--metric", "speed"), "decode_tokens_per_s"),
        (("--metric", "decode_tokens_per_s", "--plot", "x.txt"), "not a supported image format"),
        (("--plot", "x.png"), "--metric"),
        (("--accept", "99"), "no run 99"),
    ],
)
def test_bad_input_costs_two_and_a_sentence(path, capfd, arguments, told):
    result = ask("--history", str(path), *arguments)
    assert result.exit_code == 2
    assert told in result.output + capfd.readouterr().err
    assert not Path("x.txt").exists()


def test_no_runs_yet(tmp_path):
    result = ask("--history", str(tmp_path / "none"))
    assert result.exit_code == 0 and "no runs" in result.output


def test_bars():
    assert bars([0, 7]) == "▁█"
    assert bars([3]) == "▁"
    assert bars([0, float("nan"), float("inf"), 1]) == "▁??█"


def test_needs_nothing_heavy():
    """Listing must not load torch, NumPy or matplotlib."""
    code = (
        "import sys, typer; from pipeline.commands import history; history.register(typer.Typer()); "
        "history.show(None, None, None, 5, None, None, None, None); "
        "print(sorted({'torch', 'numpy', 'matplotlib', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
