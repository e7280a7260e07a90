"""One figure and how it was got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

How = Literal["measured", "emulated", "estimated"]


@dataclass(frozen=True)
class Measurement:
    """A figure with its unit, its error and its origin.

    Attributes:
        name: what it is, e.g. "mean_kl"; the names that a budget can limit are listed in `eval.budget`.
        value: the figure; NaN or infinite where what was judged answered so (a budget fails it).
        unit: e.g. "nats/token", "tokens/s", "bytes"; "" for a plain ratio.
        how: measured here, emulated (counted by an emulator), or estimated from a formula.
        error: one standard error in the same unit; None where there is none.
        n: how many observations stand behind it (tokens, repeats); None where that means nothing.
        note: one line for the reader: the method, the interval, the source.
        subject: what was judged: "npu", "cpu" (the artifacts), "reference" (the float model), "soc"
            (the phone's chip), "host" (this machine), "files", "run".
        low, high: the figure's interval in the same unit; None where there is none. A speed limit is held
            against `low`.
    """

    name: str
    value: float
    unit: str
    how: How
    error: float | None = None
    n: int | None = None
    note: str = ""
    subject: str = ""
    low: float | None = None
    high: float | None = None
