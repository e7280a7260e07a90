"""Confidence bounds of an estimate with a standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEAST_DOCUMENTS = 4  # below them no bound is told: it would rest on one or two differences


@dataclass(frozen=True)
class Sample:
    """What stands behind an error: so many documents, worth so many degrees of freedom."""

    documents: int
    freedom: float


def correction(shares: np.ndarray) -> np.ndarray:
    """What the squared residual of each cluster is multiplied by, float64 [clusters].

    The mean lies nearer to a large cluster than to others, so its residual is too small. Where all values are
    independent, by 1 - w of its variance; where a cluster moves as a whole, by 2 w - sum w^2 (w: its share of the
    values). The larger of the two corrections is taken. Clusters of one size: G / (G - 1) in both cases.

    Args:
        shares: float64 [clusters], of the values, that sum to 1; each below 1.
    """
    return 1 / np.minimum(1 - shares, 1 - 2 * shares + (shares**2).sum())


def sample_of(sizes: Sequence[float] | np.ndarray) -> Sample:
    """Degrees of freedom of the clustered error of a mean (`metrics.ratio_mean`), after Satterthwaite.

    Where clusters move as a whole, the squared error is a quadratic form u'Bu of independent u of equal variance, with
    B = M'DM, M = I - 1w', D = diag(a w^2), w the clusters' shares and a their `correction`; its degrees of freedom are
    tr(B)^2 / tr(B^2) (Satterthwaite 1946; Bell and McCaffrey 2002). That is G - 1 for G clusters of one size, and
    hardly more than 1 where one of them holds nearly everything.

    Args:
        sizes: values in each cluster.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    sizes = sizes[sizes > 0]
    if len(sizes) < 2:
        return Sample(len(sizes), 0.0)
    w = sizes / sizes.sum()
    d = correction(w) * w**2
    total, ww, dw = float(d.sum()), float(w @ w), float(d @ w)
    trace = total - 2 * dw + total * ww
    squared = (
        float(d @ d) + 2 * (dw**2 + ww * float(d @ d)) + (total * ww) ** 2
        - 4 * float((d**2) @ w) + 2 * total * float(d @ w**2) - 4 * total * dw * ww
    )  # fmt: skip
    lost = squared < 1e-10 * total**2  # float64 cannot tell, and it is hardly more than 1
    return Sample(len(sizes), 1.0 if lost else max(trace**2 / squared, 1.0))


def student_quantile(level: float, freedom: float) -> float:
    """The quantile of Student's t with `freedom` >= 1 degrees of freedom.

    Exact for 1 and 2 degrees (and that of the next whole number below 3 is taken for fractions); else the expansion in
    1/freedom of Abramowitz and Stegun, 26.7.5 (error below 1 % from 3 degrees on, for levels up to 0.999).
    """
    if freedom < 2:
        return math.tan(math.pi * (level - 0.5))
    if freedom < 3:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    x = NormalDist().inv_cdf(level)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom ** (k + 1) for k, term in enumerate(terms))


def multiplier(confidence: float, freedom: float | None = None) -> float:
    """How many standard errors away a bound lies that is right with this confidence, on one side.

    Args:
        freedom: degrees of freedom of the error; None: many.
    """
    if freedom is None:
        return NormalDist().inv_cdf(confidence)
    return student_quantile(confidence, freedom) if freedom >= 1 else math.inf


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
