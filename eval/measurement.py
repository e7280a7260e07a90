"""One figure and how it was got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

How = Literal["measured", "emulated", "estimated"]
JSON_NUMBERS: Any = {"ser_json_inf_nan": "strings"}
"""pydantic's configuration of what may hold NaN and infinities: JSON has neither, so they are written as "NaN",
"Infinity" and "-Infinity", which are read as numbers again."""


@dataclass(frozen=True)
class Measurement:
    """A figure with its unit, its error and its origin.

    Attributes:
        name: what it is, e.g. "mean_kl"; the names that a budget can limit are listed in `eval.budget.budget`.
        value: the figure; NaN or infinite where what was judged answered so (a budget fails it).
        unit: e.g. "nats/token", "tokens/s", "bytes"; "" for a plain ratio.
        how: measured on the runtime that ships, emulated (a simulator, an emulator, an interpreter or torch ran
            in its place), or estimated from a formula.
        error: one standard error in the same unit; None where there is none.
        n: how many observations stand behind it (tokens, repeats); None where that means nothing.
        note: one line for the reader: the method, the interval, the source.
        subject: what was judged: "npu", "cpu" (the artifacts), "reference" (the float model), "soc"
            (the phone's chip), "host" (this machine), "files", "run".
        low, high: the figure's interval in the same unit; None where there is none. A speed limit is held
            against `low`.
        by: what ran to get it, with its version, e.g. "Qualcomm's HTP simulator on x86, onnxruntime-qnn 2.5.0";
            "" where nothing ran (a file's size).
    """

    __pydantic_config__: ClassVar[Any] = JSON_NUMBERS

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
    by: str = ""
