"""A child process that crashes, hangs or fails gives a typed error, and the log is kept."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bluelm.errors import InputError, InterruptedRun, OutOfMemoryError, TargetError, UnavailableError
from targets.host.child import Child, next_core
from targets.qualcomm.messages import Chip, LoadGraphs
from tests.support.limits import HANG_S

MODULE = "tests.support.child_modules"


@pytest.fixture
def child(tmp_path: Path):
    made = Child(MODULE, tmp_path / "log")
    yield made
    made.close()


def test_messages_go_there_and_back(child: Child) -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert child.call({"a": 1}, HANG_S) == {"a": 1}
    np.testing.assert_array_equal(child.call(array, HANG_S), array)


@pytest.mark.linux
def test_children_are_kept_on_one_core_each_in_turn(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    cores = [next_core() for _ in allowed]
    assert set(cores) == allowed
    child = Child(MODULE, tmp_path / "log", core=cores[0])
    assert child.call("cores", HANG_S) == {cores[0]}
    child.close()


def test_an_error_of_ours_crosses_over(child: Child) -> None:
    with pytest.raises(InputError) as caught:
        child.call("fail", HANG_S)
    assert (caught.value.problem, caught.value.where, caught.value.fix) == (
        "bad words",
        "here",
        "better ones",
    )
    assert child.call("still there", HANG_S) == "still there"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("crash", ["SIGSEGV", "about to crash"]),
        ("leave", ["exit code 7", "leaving"]),
        ("bug", ["exit code 1", "ZeroDivisionError: a bug of ours"]),
    ],
)
def test_a_dying_child_is_a_target_error(child: Child, message: str, words: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        child.call(message, HANG_S)
    for word in words:
        assert word in caught.value.problem
    assert caught.value.where == str(child.log) and child.log.exists()
    with pytest.raises(TargetError):
        child.call("anybody?", HANG_S)


def test_a_killed_child_is_no_fault_of_the_model(child: Child) -> None:
    """What ends children with SIGKILL is the system's OOM killer."""
    with pytest.raises(OutOfMemoryError, match=r"killed \(SIGKILL\).* memory ran out: .* GB are free") as caught:
        child.call("KILL", HANG_S)
    assert caught.value.exit_code == 2 and "--max-memory" in (caught.value.fix or "")


def test_a_child_that_somebody_ends_is_an_interruption(child: Child) -> None:
    with pytest.raises(InterruptedRun, match=r"terminated from outside \(SIGTERM\)") as caught:
        child.call("TERM", HANG_S)
    assert caught.value.exit_code == 6


def test_memory_that_runs_out_in_a_child_is_said(child: Child) -> None:
    with pytest.raises(OutOfMemoryError, match="memory ran out"):
        child.call("much", HANG_S)
    assert child.call("still there", HANG_S) == "still there"


def test_a_stopped_child_is_told_of(
    child: Child, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("targets.host.child.HEARTBEAT_S", 0.05)
    pid = child._process.pid

    def wake() -> None:
        while not caplog.records:
            time.sleep(0.02)
        os.kill(pid, signal.SIGCONT)

    waker = threading.Thread(target=wake, daemon=True)
    waker.start()
    assert child.call("STOP", HANG_S) == "STOP"
    assert f"tests.support.child_modules (process {pid}) is stopped; `kill -CONT {pid}`" in caplog.messages[0]
    assert caplog.records[0].levelname == "WARNING"


def test_a_child_that_stays_stopped_is_an_interruption(child: Child) -> None:
    with pytest.raises(InterruptedRun, match="was stopped from outside"):
        child.call("STOP", 1)
    assert child._process.poll() is not None


def test_a_hanging_child_is_ended(child: Child) -> None:
    with pytest.raises(TargetError, match=r"did not answer str within 0\.3 s"):
        child.call("hang", 0.3)
    assert child._process.poll() is not None


def test_without_the_vendors_package(tmp_path: Path) -> None:
    """An import of onnxruntime_qnn that fails, as where it is not installed: exit code 5 and the fix."""
    (tmp_path / "onnxruntime_qnn.py").write_text("raise ImportError('No module named onnxruntime_qnn')")
    child = Child("targets.qualcomm.worker", tmp_path / "log", environment={"PYTHONPATH": str(tmp_path)})
    try:
        with pytest.raises(UnavailableError) as caught:
            child.call(LoadGraphs("x", "x.onnx", Chip(57, 75)), HANG_S)
    finally:
        child.close()
    assert caught.value.exit_code == 5
    assert "bluelm-export[qualcomm]" in (caught.value.fix or "")
