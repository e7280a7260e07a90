"""Instructions a token as figures, and a gate that compares them with the last accepted run's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.history import History, KeptRun
from eval.measurement import Measurement
from targets.emulator.count import Counts

TOLERANCE = 0.005  # repeats differ by 0.001 and less
NAMES = ("prefill_instructions_per_token", "decode_instructions_per_token")


def figures(counts: Counts) -> list[Measurement]:
    """Both counts; what counted them stands in the note, since only counts of the same tools compare."""
    notes = (f"whole chunk; {counts.tools}", f"behind {counts.depth} tokens; {counts.tools}")
    values = (counts.prefill, counts.decode)
    return [
        Measurement(name, value, "instructions/token", "emulated", note=note, subject="cpu", by=counts.tools)
        for name, value, note in zip(NAMES, values, notes, strict=True)
    ]


@dataclass(frozen=True)
class CountChange:
    """One count against the accepted one; `change` is relative, None where nothing compares."""

    name: str
    value: float
    accepted: float | None
    change: float | None
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        if self.change is None:
            return f"{self.name}: {self.value:,.0f} ({self.note})"
        return f"{self.name}: {self.value:,.0f}, accepted {self.accepted:,.0f}: {self.change:+.2%}{self.note}"


def compare(found: Sequence[Measurement], accepted: KeptRun | None, tolerance: float) -> list[CountChange]:
    """Each count may be larger than the accepted one by at most `tolerance` (relative).

    Fewer instructions pass, however many fewer. Counts by other tools, or at another depth, do not compare:
    they pass and begin anew, and the note says so.
    """
    return [_compare(m, accepted.figure(m.name, m.subject) if accepted else None, tolerance) for m in found]


def _compare(found: Measurement, accepted: Measurement | None, tolerance: float) -> CountChange:
    if accepted is None:
        return CountChange(found.name, found.value, None, None, True, "the first: nothing to compare with")
    if accepted.note != found.note:
        note = f"counted otherwise than the accepted run ({accepted.note}): nothing to compare with"
        return CountChange(found.name, found.value, None, None, True, note)
    change = found.value / accepted.value - 1
    passed = change <= tolerance
    note = "" if passed else f"; at most {tolerance:.2%} more is allowed"
    return CountChange(found.name, found.value, accepted.value, change, passed, note)


def gate(
    title: str, target: str, counts: Counts, history: History, tolerance: float = TOLERANCE
) -> tuple[list[CountChange], bool]:
    """Compare with the last accepted run of that title, then append this one to the history.

    Returns:
        the comparisons, and whether all passed. A run that failed is kept, but later ones are not compared
        with it (`bluelm-export history --accept` changes that).
    """
    found = figures(counts)
    compared = compare(found, history.last_accepted(title), tolerance)
    passed = all(c.passed for c in compared)
    history.append(KeptRun(title, target, passed, tuple(found), {"tools": counts.tools}))
    return compared, passed
