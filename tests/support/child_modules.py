"""A child that misbehaves on demand: `python -m tests.support.child_modules <handle>`."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np

from bluelm.errors import InputError
from targets.host.child import serve


def handle(message: object) -> object:
    """What the message says: a string that names a misbehaviour, or anything else to be given back."""
    if not isinstance(message, str):
        return message
    if message == "crash":
        print("about to crash", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if message in ("KILL", "TERM", "STOP"):
        os.kill(os.getpid(), getattr(signal, f"SIG{message}"))
    if message == "much":
        np.ones(1 << 50, np.float64)
    if message == "hang":
        signal.pause()
    if message == "leave":
        print("leaving", flush=True)
        sys.exit(7)
    if message == "cores":
        return os.sched_getaffinity(0)
    if message == "fail":
        raise InputError("bad words", where="here", fix="better ones")
    if message == "bug":
        raise ZeroDivisionError("a bug of ours")
    return message


if __name__ == "__main__":
    serve(handle, sys.argv)
