"""A signal is a signal, whatever a library makes of the exception that it raises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bluelm.errors import InputError
from bluelm.system import interrupt
from pipeline.errors import guard
from tests.support.checkpoints.shapes import write_checkpoint

READING = """
import os, random, signal, sys, threading, time
from bluelm.system import interrupt
from bluelm.checkpoint import Checkpoint
from pipeline.errors import guard

checkpoint = Checkpoint.open(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts in the background inherits that it is ignored
interrupt.listen()

def read():
    while True:
        for name in checkpoint.tensors:
            checkpoint.tensor(name)

def stop():
    time.sleep(random.uniform(0.0005, 0.02))
    os.kill(os.getpid(), random.choice([signal.SIGINT, signal.SIGTERM]))

codes = []
for _ in range(60):
    interrupt._seen.clear()
    thread = threading.Thread(target=stop)
    try:
        thread.start()
        codes.append(guard(read, "again"))
        thread.join()
    except KeyboardInterrupt:  # before the reading began
        thread.join()
print(sorted(set(codes)))
"""


@pytest.mark.parametrize("error", [InputError("truncated or corrupt"), ValueError("no shape"), KeyboardInterrupt()])
def test_after_a_signal_every_error_is_an_interruption(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> int:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 0)  # lets the handler run
        raise error

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupt.listen()
        assert guard(work, "again") == 6
        assert interrupt.seen()
    finally:
        interrupt._seen.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_interrupts_while_tensors_are_read(tmp_path: Path) -> None:
    """Real signals inside the readers in C: none comes back as a damaged file."""
    model = write_checkpoint(tmp_path / "model", layers=2)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", READING, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[6]", done.stderr[-2000:]
