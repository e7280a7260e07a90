"""What an estimate with a standard error can be sure of: bounds at a level of confidence."""

from __future__ import annotations

import math
from statistics import NormalDist


def student_quantile(level: float, freedom: int) -> float:
    """The quantile of Student's t with `freedom` >= 1 degrees of freedom.

    Exact for 1 and 2 degrees; else the expansion in 1/freedom of Abramowitz and Stegun, 26.7.5 (error below 1 % from
    3 degrees on, for levels up to 0.999).
    """
    if freedom == 1:
        return math.tan(math.pi * (level - 0.5))
    if freedom == 2:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    x = NormalDist().inv_cdf(level)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom ** (k + 1) for k, term in enumerate(terms))


def multiplier(confidence: float, samples: int | None = None) -> float:
    """How many standard errors away a bound lies that is right with this confidence, on one side.

    Args:
        samples: independent samples behind the error (windows, prompts); None: many.
    """
    if samples is None:
        return NormalDist().inv_cdf(confidence)
    return student_quantile(confidence, samples - 1) if samples > 1 else math.inf


def enough(value: float, error: float, limit: float, factor: float, n: int) -> int | None:
    """Observations at which the bound `factor` errors away would lie on `value`'s side of `limit`.

    The error falls with the square root of their number. Two digits, rounded up; None where the value lies on the
    limit and no number would do.
    """
    distance = abs(limit - value)
    if distance == 0 or not math.isfinite(factor):
        return None
    needed = n * (factor * error / distance) ** 2
    if not math.isfinite(needed) or needed > 1e15:
        return None
    unit = 10 ** max(0, math.floor(math.log10(max(needed, 1))) - 1)
    return math.ceil(needed / unit) * unit
