"""Remembers Ctrl-C and SIGTERM: a C library may turn the exception that they raise into an error of its own.

torch, inside safetensors' reader, swallows a KeyboardInterrupt and says that a tensor has no shape.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import NoReturn

_seen = threading.Event()


def listen() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt and be remembered; one that is ignored stays so."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def seen() -> bool:
    """Whether the process was asked to stop."""
    return _seen.is_set()


def _note(number: int, frame: FrameType | None) -> NoReturn:
    _seen.set()
    raise KeyboardInterrupt
