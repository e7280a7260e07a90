"""Repeats of one figure: median, an interval that assumes no distribution, and whether they agree."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from eval.measurement import How, Measurement

AT_LEAST = 5
NOISY = 0.05  # repeats that differ by more of their median than this were disturbed
CONFIDENCE = 0.90


@dataclass(frozen=True)
class Repeats:
    """At least five values of the same figure, in the order in which they were taken."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) < AT_LEAST:
            raise ValueError(f"{len(self.values)} repeats; an interval takes at least {AT_LEAST}")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Two of the values, between which the true median lies with at least 90 % confidence.

        Order statistics k and n + 1 - k: P = 1 - 2 * sum_{i < k} C(n, i) / 2^n, whatever the distribution
        (Conover, Practical Nonparametric Statistics, 3.2). Of five: the smallest and the largest, 93.75 %.
        """
        ordered = sorted(self.values)
        outside = _outside(len(ordered))
        return ordered[outside], ordered[-1 - outside]

    @property
    def confidence(self) -> float:
        return _confidence(len(self.values), _outside(len(self.values)))

    @property
    def spread(self) -> float:
        """Largest minus smallest, as a share of the median."""
        return (max(self.values) - min(self.values)) / self.median

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY

    def measurement(self, name: str, unit: str, how: How, subject: str, note: str = "") -> Measurement:
        """The median with its interval; where repeats disagree, the note says: a noisy machine."""
        low, high = self.interval
        quiet = f"repeats agree within {self.spread:.1%}"
        state = f"a noisy machine: repeats differ by {self.spread:.0%}" if self.noisy else quiet
        text = f"median of {len(self.values)}, {self.confidence:.0%} interval {low:,.4g} to {high:,.4g}; {state}"
        # 1.2533 s / sqrt(n): standard error of the median of normal repeats
        error = 1.2533 * statistics.stdev(self.values) / math.sqrt(len(self.values))
        return Measurement(
            name,
            self.median,
            unit,
            how,
            error,
            len(self.values),
            f"{text}; {note}" if note else text,
            subject,
            low=low,
            high=high,
        )


def _confidence(count: int, outside: int) -> float:
    return 1 - 2 * sum(math.comb(count, i) for i in range(outside + 1)) / 2**count


def _outside(count: int) -> int:
    """How many values may be dropped at each end while 90 % confidence is kept."""
    outside = 0
    while _confidence(count, outside + 1) >= CONFIDENCE:
        outside += 1
    return outside
