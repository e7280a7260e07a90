"""Writers for the test of the history: a module of its own, so that their processes start fast."""

from __future__ import annotations

import threading
from pathlib import Path
from threading import Barrier

from eval.history import History, KeptRun
from eval.measurement import Measurement
from tests.support.limits import HANG_S

FIGURES = 20
PROCESSES, THREADS = 20, 10


def make_run(title: str, number: int = 0) -> KeptRun:
    """A run whose figures all hold its number: a mixed or half one would show."""
    figures = tuple(
        Measurement(f"figure_{i}", float(number), "u", "measured", 0.5, 5, "note", "cpu", 1.0, 2.0)
        for i in range(FIGURES)
    )
    return KeptRun(title, "snapdragon (sm8650)", True, figures, {"number": number})


def write_many(path: str, process: int, start: Barrier) -> None:
    """Ten writers, each with a connection of its own, that begin when all two hundred are there."""

    def write(thread: int) -> None:
        start.wait(HANG_S)
        History(Path(path)).append(make_run("many", process * THREADS + thread))

    threads = [threading.Thread(target=write, args=(t,)) for t in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
