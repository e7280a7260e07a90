"""The tool's commands with faults done to them: killed, interrupted, on failing disks, under a clock that goes back.

A command is a process forked from this one, in a session of its own: `prepare` imports beforehand what takes seconds,
and lets the shim (`fault_shim.c`) into this process and whatever it starts. `python -m tests.support.faults.faulty` is
a small series for the tests; benchmarks/faults/command.py is the long one.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SHIM = Path(__file__).with_name("fault_shim.c")
HEAVY = (
    "torch", "onnx", "onnxruntime", "sentencepiece", "gguf", "matplotlib.figure", "model_signing", "sigstore_models",
    "pipeline.cli", "pipeline.run.run", "pipeline.commands.quantize", "pipeline.bundles.bundling",
    "export.bundle.build",
)  # fmt: skip
ROOTS = ("bluelm", "calibration", "compress", "export", "targets", "eval")
READ, WRITE = 1, 2
COUNT, KILL_GROUP, SIGNAL, FAIL = range(4)
HANG_S = 900.0


class Control(ctypes.Structure):
    """What the shim is to do, in memory that all processes share; fields as in `fault_shim.c`."""

    _fields_ = (
        ("owner", ctypes.c_int32),
        ("kinds", ctypes.c_int32),
        ("action", ctypes.c_int32),
        ("number", ctypes.c_int32),
        ("at", ctypes.c_int64),
        ("until", ctypes.c_int64),
        ("seen", ctypes.c_int64),
        ("fired", ctypes.c_int64),
        ("victim", ctypes.c_int32),
        ("pad", ctypes.c_int32),
        ("clock_at", ctypes.c_int64),
        ("clock_back", ctypes.c_int64),
        ("clock_seen", ctypes.c_int64),
        ("under", ctypes.c_char * 4096),
        ("what", ctypes.c_char * 256),
    )

    @staticmethod
    def open(path: Path) -> Control:
        """The one in a file, made if need be."""
        size = ctypes.sizeof(Control)
        with path.open("a+b") as file:
            file.truncate(size)
            return Control.from_buffer(mmap.mmap(file.fileno(), size))

    def set(self, under: Path | None = None, **values: int) -> None:
        """Nothing happens but what is said here; `under`: to files below this folder."""
        ctypes.memset(ctypes.addressof(self), 0, ctypes.sizeof(self))
        self.owner, self.until = os.getpid(), 1 << 62
        for name, value in values.items():
            setattr(self, name, value)
        self.under = f"{under}/".encode() if under is not None else b""


def prepare(place: Path) -> Control:
    """The shim's settings, for a process that has it loaded; another becomes one that has, which begins again.

    Args:
        place: folder of the compiled shim and its settings.
    """
    library, settings = place / "fault_shim.so", place / "control"
    place.mkdir(parents=True, exist_ok=True)
    if os.environ.get("FAULT_CONTROL") != str(settings):
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
        Control.open(settings).set()
        os.environ |= {"FAULT_CONTROL": str(settings), "LD_PRELOAD": str(library)}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    control = Control.open(settings)
    control.set()
    for name in HEAVY:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)  # threads do not survive a fork
    stages = importlib.import_module("pipeline.run.stages")
    stages.code(*ROOTS)  # parsed once, for all commands
    return control


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal that killed it; what it said on stderr."""

    code: int
    said: str
    seconds: float
    left: int = 0  # processes of its own that outlived it by more than 10 s

    @property
    def problem(self) -> str:
        """The line that says what was wrong."""
        lines = [line.strip() for line in self.said.splitlines()]
        return next((line for line in lines if line.startswith(("error:", "internal error:"))), "")

    @property
    def clear(self) -> bool:
        """It passed, or told what is wrong in words."""
        told = self.code == 0 or (2 <= self.code <= 6 and self.problem.startswith("error:"))
        return told and "Traceback" not in self.said


class Command:
    """A command of the tool under way."""

    def __init__(self, words: Sequence[str | Path], folder: Path) -> None:
        """Begin it, in `folder`; its home, and what it says, lie beside that."""
        home = folder.with_name(f"{folder.name}.home")
        home.mkdir(exist_ok=True)
        self._said, self._begun = home / "stderr", time.monotonic()
        self._said.write_text("")
        self._seen: dict[int, psutil.Process] = {}
        self.pid = os.fork()
        if self.pid == 0:
            _be(list(map(str, words)), folder, home)
        self.process = psutil.Process(self.pid)

    def children(self) -> list[psutil.Process]:
        """Processes below it, now."""
        try:
            found = self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._seen |= {each.pid: each for each in found}
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to its process group; SIGKILL to its children's groups as well."""
        others = self.children() if number == signal.SIGKILL else []
        _send(lambda: os.killpg(self.pid, number))
        for each in others:
            _send(each.kill)

    def wait(self, meanwhile: Callable[[float], object] = lambda _: None) -> Ended:
        """Its end.

        Args:
            meanwhile: called again and again with the seconds since it began.
        """
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            seconds = time.monotonic() - self._begun
            if done:
                break
            if seconds > HANG_S:
                self.kill()
            self.children()
            meanwhile(seconds)
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        _, left = psutil.wait_procs(self._seen.values(), timeout=HANG_S / 10)
        for each in left:
            _send(each.kill)
        return Ended(code, self._said.read_text(errors="replace"), round(seconds, 2), len(left))


def run(words: Sequence[str | Path], folder: Path) -> Ended:
    """A command from its beginning to its end."""
    return Command(words, folder).wait()


def _send(call: Callable[[], object]) -> None:
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        call()


def _be(words: list[str], folder: Path, home: Path) -> None:
    """Be the command line from here on."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and inherited
        os.chdir(folder)
        os.environ |= {"HOME": str(home), "BLUELM_EXPORT_HISTORY": str(folder / "history.sqlite")}
        for number, name in ((1, "stdout"), (2, "stderr")):
            descriptor = os.open(home / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, number)
            os.close(descriptor)
        code = _main(words)
    finally:
        _finish()
        os._exit(code)


def _main(words: list[str]) -> int:
    """What the interpreter makes of `main`: its exit code, and an exception given to sys.excepthook."""
    from pipeline.cli import main

    try:
        main(words)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:  # noqa: BLE001 - as the interpreter would
        kind, error, trace = sys.exc_info()
        assert kind is not None and error is not None
        sys.excepthook(kind, error, trace)
        return 1


def _finish() -> None:
    """What the interpreter does at its end."""
    for step in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):  # pyright: ignore[reportAttributeAccessIssue]
        try:
            step()
        except BaseException as error:  # noqa: BLE001
            print(f"at the end: {error!r}", file=sys.stderr)
