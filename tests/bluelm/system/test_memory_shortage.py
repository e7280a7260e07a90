"""Memory that runs out and programs that something ends: said as such, with the code and what would fit."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from bluelm.errors import InputError, InterruptedRun, OutOfMemoryError
from bluelm.system import children, memory
from pipeline import cli, terminal
from pipeline.commands import sweep
from pipeline.errors import guard
from tests.support.limits import HANG_S


def refused_by_torch() -> int:
    torch.empty(2**46)
    return 0


def refused_by_numpy() -> int:
    np.ones(2**50)
    return 0


def refused_by_the_system() -> int:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def called_damage() -> int:
    try:
        refused_by_numpy()
    except MemoryError:
        raise InputError("the file is truncated or corrupt", fix="fetch it again") from None
    return 0


def a_gpu() -> int:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def wrong_shape() -> int:
    raise RuntimeError("a wrong shape")


@pytest.mark.parametrize("work", [refused_by_torch, refused_by_numpy, refused_by_the_system, called_damage, a_gpu])
def test_memory_that_runs_out_is_said_as_such(work: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert guard(work, "again") == 2
    told = capsys.readouterr().err
    assert "memory ran out" in told and "corrupt" not in told and "Traceback" not in told
    assert ("--quantize-on cpu" if work is a_gpu else "--max-memory") in told


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        guard(wrong_shape, "again")
    assert not memory.is_shortage(InputError("out of memory is a word in a file"))
    with pytest.raises(ValidationError) as caught:  # nor does it quote a file of megabytes to search it
        TypeAdapter(int).validate_python("out of memory")
    assert not memory.is_shortage(caught.value)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory.free()
    for most, used, free in (("3000000", "1000000", 2_000_000), ("1000", "2000", 0)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        assert memory.free() == free
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free() > machine / 2


@pytest.mark.linux  # elsewhere psutil does not tell how much data a process has
def test_a_limit_of_the_shell_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = psutil.Process().memory_info()
    limits = {resource.RLIMIT_AS: (resource.RLIM_INFINITY,) * 2, resource.RLIMIT_DATA: (resource.RLIM_INFINITY,) * 2}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    machine = memory.free()
    for limit, used in ((resource.RLIMIT_AS, taken.vms), (resource.RLIMIT_DATA, taken.data)):
        with monkeypatch.context() as patch:
            patch.setitem(limits, limit, (used + 2**25, resource.RLIM_INFINITY))
            assert 0 < memory.free() < 2**26 < machine
            patch.setitem(limits, limit, (2**20, 2**20))
            assert memory.free() == 0


def no_thread() -> int:
    raise RuntimeError("can't start new thread")


def test_threads_that_the_system_refuses_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert guard(no_thread, "again") == 2
    assert "no more threads" in capsys.readouterr().err


def nothing_left() -> int:
    raise MemoryError


def test_memory_that_runs_out_while_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "free", nothing_left)
    assert guard(nothing_left, "again") == 2
    assert "memory ran out" in capsys.readouterr().err


def test_memory_that_runs_out_before_a_command_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda arguments: nothing_left())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    with pytest.raises(SystemExit) as left:
        cli.main(["targets"])
    assert left.value.code == 2 and "memory ran out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (-9, OutOfMemoryError, "SIGKILL"),
        (137, OutOfMemoryError, "SIGKILL"),
        (-15, InterruptedRun, "SIGTERM"),
        (-1, InterruptedRun, "SIGHUP"),
        (-11, type(None), ""),
        (-34, type(None), ""),
        (1, type(None), ""),
        (0, type(None), ""),
    ],
)
def test_return_codes(code: int, kind: type, words: str) -> None:
    error = children.killed("the compiler", code)
    assert type(error) is kind
    assert words in str(error)


def test_names_of_return_codes() -> None:
    assert [children.name_of(code) for code in (0, 7, -11, -100)] == [
        "exit code 0", "exit code 7", "SIGSEGV", "signal 100",
    ]  # fmt: skip


def test_a_program_is_watched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(children, "HEARTBEAT_S", 0.05)
    done = children.run([sys.executable, "-c", "print('\xff'); raise SystemExit(3)"], "python")
    assert (done.returncode, done.stderr) == (3, "")
    with pytest.raises(OutOfMemoryError, match="sh was killed"):
        children.run(["sh", "-c", "kill -9 $$"], "sh", limit_s=HANG_S)
    with pytest.raises(subprocess.TimeoutExpired):
        children.run(["sleep", "1000"], "sleep", limit_s=0.2)
    assert not caplog.records
    with pytest.raises(InterruptedRun, match="sh was stopped"):
        children.run(["sh", "-c", "kill -STOP $$"], "sh", limit_s=2)
    assert "sh (process" in caplog.messages[0] and "is stopped" in caplog.messages[0]


def test_warnings_of_the_log_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_warnings()
    terminal.show_warnings()
    children.log.warning("%s is stopped\x1b[2J", "x")
    children.log.error("told elsewhere")
    assert capsys.readouterr().err == "warning: x is stopped\\x1b[2J\n"


@pytest.mark.parametrize(("signal", "code", "words"), [("KILL", 2, "memory ran out"), ("SEGV", 1, "died (SIGSEGV)")])
def test_a_run_of_a_sweep_that_dies_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str, code: int, words: str
) -> None:
    """The others go on; a run that somebody ends is the sweep's end."""
    variant = sweep.Variant("gptq", "4", "32", "snapdragon")
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nkill -{signal} $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    row = sweep.do_variant(variant, tmp_path, [])
    assert row.exit_code == code and words in row.problem
    program.write_text("#!/bin/sh\nkill -TERM $$\n")
    with pytest.raises(KeyboardInterrupt):
        sweep.do_variant(variant, tmp_path, [])


@pytest.mark.linux
def test_a_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    held = np.ones(100_000_000)  # 800 MB
    code = "import numpy\nfrom bluelm.system.memory import peak\nprint(peak())\nnumpy.ones(50_000_000)\nprint(peak())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, behind = map(int, ran.stdout.split())
    assert before < 0.5 * held.nbytes <= behind - before + 50e6
    assert memory.peak() > held.nbytes
