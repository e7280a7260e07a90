"""Compares a run with an earlier one: what got worse beyond its error.

Where both were judged on the same tokens of the same text, the differences are taken document by document: how hard a
document is cancels out, and a regression shows that is too small for the errors of either run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from eval.accuracy.judge import DocumentSums
from eval.accuracy.metrics import ratio_mean
from eval.budget.budget import Check
from eval.budget.confidence import multiplier
from eval.measurement import Measurement
from eval.report import Report

GROWTH = 0.01  # files of the same content differ by less from one compiler run to the next
Figures = Mapping[tuple[str, str], Measurement]


@dataclass(frozen=True)
class Paired:
    """A mean over tokens that two runs may be compared on document by document.

    Attributes:
        of: its sums by document. worse: 1 if more is worse, -1 if less is.
    """

    figure: str
    unit: str
    worse: int
    of: Callable[[DocumentSums], tuple[float, ...]]


PAIRED = (
    Paired("log_perplexity", "nats/token", 1, lambda sums: sums.nll),
    Paired("mean_kl", "nats/token", 1, lambda sums: sums.kl),
    Paired("top1_agreement", "", -1, lambda sums: sums.top1),
    Paired("top5_agreement", "", -1, lambda sums: sums.top5),
)
ALONE = {"p99_kl": 1, "max_kl": 1, "first_divergence": -1}
UNPAIRED = {"perplexity_ratio": 1, "mean_kl": 1, "top1_agreement": -1, "top5_agreement": -1, **ALONE}
SIZES = (("artifact_bytes", "files"), ("memory_bytes", "soc"))
SPEEDS = (("decode_tokens_per_s", "soc"), ("prefill_tokens_per_s", "soc"), ("decode_tokens_per_s", "host"))


def regressions(now: Report, before: Report, confidence: float) -> list[Check]:
    """One check a figure that both runs have; it fails if the figure is worse beyond its error."""
    mine, theirs = ({(m.name, m.subject): m for m in report.measurements} for report in (now, before))
    checks: list[Check] = []
    for subject in now.artifacts:
        if subject not in before.artifacts:
            continue
        pair = now.documents.get(subject), before.documents.get(subject)
        same_text = now.inputs.get("evaluation") == before.inputs.get("evaluation")
        if same_text and pair[0] and pair[1] and pair[0].tokens == pair[1].tokens and sum(pair[0].tokens) > 0:
            found = [paired(p, pair[0], pair[1], subject, confidence) for p in PAIRED]
            found += _unpaired(mine, theirs, subject, ALONE, confidence, "")
        else:
            found = list(_unpaired(mine, theirs, subject, UNPAIRED, confidence, "; other text or sums, so not paired"))
        kl = mine.get(("mean_kl", subject))  # got as all of the artifact's answers were
        checks += found if kl is None else [replace(check, how=kl.how, by=kl.by) for check in found]
    return [*checks, *_sizes(mine, theirs), *_speeds(mine, theirs)]


def paired(about: Paired, now: DocumentSums, before: DocumentSums, subject: str, confidence: float) -> Check:
    """The mean difference a token, with the clustered error of a ratio (see `metrics.ratio_mean`)."""
    apart = np.array(about.of(now)) - np.array(about.of(before))
    tokens = np.array(now.tokens, dtype=np.float64)
    found = ratio_mean(apart[tokens > 0], tokens[tokens > 0])
    sample = now.samples[""]
    note = f"paired on {found.n:,} tokens of {sample.documents} documents"
    return _difference(
        about.figure, subject, found.value, found.error, about.unit, about.worse, confidence, sample.freedom, note
    )


def _unpaired(
    mine: Figures, theirs: Figures, subject: str, names: Mapping[str, int], confidence: float, why: str
) -> Iterator[Check]:
    for name, worse in names.items():
        a, b = mine.get((name, subject)), theirs.get((name, subject))
        if b is None:
            continue
        if a is None:
            yield Check(_name(name), subject, None, b.unit, 0, None, False, note="not measured", outcome="failed")
            continue
        error = None if a.error is None or b.error is None else math.hypot(a.error, b.error)
        note = f"{a.value:,.4g} now, {b.value:,.4g} before{why}"
        yield _difference(name, subject, a.value - b.value, error, a.unit, worse, confidence, None, note)


def _difference(
    figure: str, subject: str, value: float, error: float | None, unit: str, worse: int, confidence: float,
    freedom: float | None, note: str,
) -> Check:  # fmt: skip
    """Fails where the bound says that it is worse, and where the difference is no number."""
    spread = math.inf if error is None else error and multiplier(confidence, freedom) * error
    passed = math.isfinite(value) and not worse * value > spread
    told = note if passed else f"worse beyond its error; {note}"
    shown = f" ± {error:.2g}" if error is not None else ""
    return Check(
        _name(figure), subject, value, unit, 0.0, -worse * value, passed, "measured", error,
        f"changed by {value:+.3g}{shown} {unit}".rstrip() + f"; {told}",
        None if error is None else value - spread, None if error is None else value + spread,
        "passed" if passed else "failed",
    )  # fmt: skip


def _sizes(mine: Figures, theirs: Figures) -> Iterator[Check]:
    for name, subject in SIZES:
        a, b = mine.get((name, subject)), theirs.get((name, subject))
        if a is not None and b is not None:
            margin = (1 + GROWTH) * b.value - a.value
            note = f"{a.value / 1e6:,.2f} MB now, {b.value / 1e6:,.2f} MB before"
            outcome = "passed" if margin >= 0 else "failed"
            told = note if margin >= 0 else f"larger by more than {GROWTH:.0%}; {note}"
            yield Check(_name(name), subject, a.value, "bytes", b.value, margin, margin >= 0, a.how, None, told,
                        outcome=outcome, by=a.by)  # fmt: skip


def _speeds(mine: Figures, theirs: Figures) -> Iterator[Check]:
    """Slower where the intervals do not meet; what is noisy, or was got in another way, says nothing."""
    for name, subject in SPEEDS:
        a, b = mine.get((name, subject)), theirs.get((name, subject))
        if a is None or b is None or a.how != b.how or "noisy" in a.note or "noisy" in b.note:
            continue
        high, low = (a.value if a.high is None else a.high), (b.value if b.low is None else b.low)
        passed = high >= low
        note = f"{a.value:,.4g} now, {b.value:,.4g} before"
        told = note if passed else f"slower, the intervals do not meet; {note}"
        yield Check(_name(name), subject, a.value, a.unit, low, high - low, passed, a.how, a.error, told, a.low, a.high,
                    "passed" if passed else "failed", by=a.by)  # fmt: skip


def _name(figure: str) -> str:
    return f"not_worse_{figure}"
