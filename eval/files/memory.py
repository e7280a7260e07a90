"""Peak resident memory of this process and its children, sampled while a run goes on."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

from eval.measurement import Measurement


class PeakMemory:
    """Samples in a thread: `with PeakMemory() as peak: ...; peak.measurement()`."""

    def __init__(self, seconds_between: float = 0.25) -> None:
        self._interval = seconds_between
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, resident_bytes())
            if self._stop.wait(self._interval):
                return

    def measurement(self) -> Measurement:
        """Peak so far. Pages that processes share count once for each of them: an upper bound."""
        note = "resident memory of the run and its child processes, sampled 4 times a second"
        return Measurement("peak_memory_bytes", self.bytes, "bytes", "measured", note=note, subject="run")


def resident_bytes() -> int:
    """Resident bytes of this process and all its children now."""
    own = psutil.Process()
    total = own.memory_info().rss
    for child in own.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return total
