"""Compares figures with a budget's limits: the verdict.

A figure with a standard error is compared by its confidence bounds: it passes when the bound on the far side is within
the limit, it fails when the bound on the near side is beyond it, and in between there are too few tokens to tell, which
is not a pass either.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

from pydantic import BaseModel

from eval.budget.confidence import LEAST_DOCUMENTS, Sample, enough, multiplier
from eval.budget.limits import (
    BETTER,
    IN_RUNNER,
    LIMITS,
    NOT_KNOWN,
    RUNNER,
    SAME,
    STRUCTURE,
    Bound,
    Budget,
    DomainLimits,
    Limit,
    SpeedLimit,
    bound,
)
from eval.budget.remedies import remedy
from eval.measurement import How, Measurement

Outcome = Literal["passed", "failed", "undecided"]
SURE = 0.999  # confidence from which an artifact that is better than the float model is suspect
IDENTICAL = 1e-9  # nats: quantized weights differ from float ones by more, rounding in float32 by less


@dataclass(frozen=True)
class Check:
    """One limit held against one figure.

    Attributes:
        name: the budget's key. subject: what it was held against ("npu", "cpu", "soc", "files" ...).
        value: the figure, None when it was not measured. unit: its unit. error: its standard error.
        limit: the limit. margin: how far inside the limit (negative: by how much it failed), None
            when not measured.
        passed: whether `outcome` is "passed"; "undecided": there were too few tokens to tell.
        how: how the figure was got. note: why it failed where that is not the number itself.
        low, high: bounds on the figure, each at the budget's confidence; None where it has no error.
        needed: how many tokens (answers for the first divergence, questions of tasks) would tell, if that is known.
        by: what ran to get the figure (`Measurement.by`).
    """

    name: str
    subject: str
    value: float | None
    unit: str
    limit: float
    margin: float | None
    passed: bool
    how: How | None = None
    error: float | None = None
    note: str = ""
    low: float | None = None
    high: float | None = None
    outcome: Outcome | None = None
    needed: int | None = None
    by: str = ""

    def __str__(self) -> str:
        """One line: figure, limit, by how much, and how the figure was got if it was not measured."""
        if self.value is None or self.how in (None, "measured"):
            return self._told()
        return f"{self._told()}; {self.how}" + (f" by {self.by}" if self.by else "")

    def _told(self) -> str:
        title = f"{self.name} ({self.subject})"
        bound = "at most" if self.name.startswith("max_") else "at least"
        asked = f"{bound} {_quantity(self.limit, self.unit)}"
        if self.value is None or self.margin is None:
            return f"{title}: {self.note}; the budget asks for {asked}"
        found, note = _quantity(self.value, self.unit), f"; {self.note}" if self.note else ""
        if self.name.startswith("not_"):  # a question of its own, which the note answers
            return f"{title}: {self.note or found}"
        if self.passed:
            return f"{title}: {found}, {asked}{note}"
        if self.outcome == "undecided":
            return f"{title}: {found}, {asked}: {self.note}"
        relative = abs(self.margin) / self.limit if self.limit else math.inf
        by = f" ({relative:.1%})" if self.limit else ""
        return f"{title}: {found}, {asked}: beyond by {_quantity(abs(self.margin), self.unit)}{by}{note}"


def _quantity(value: float, unit: str) -> str:
    """Five digits and the unit; bytes in MB."""
    if unit == "bytes":
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,.5g} {unit}".rstrip()


@dataclass(frozen=True)
class Verdict:
    """Passed only if every check passed."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


def judge(
    budget: Budget,
    measurements: Iterable[Measurement],
    artifacts: Sequence[str],
    samples: Mapping[str, Mapping[str, Sample]] | None = None,
) -> Verdict:
    """Hold every limit of the budget against its figures.

    Args:
        budget: the limits.
        measurements: the figures.
        artifacts: subjects that accuracy limits hold for, e.g. ("npu", "cpu"). Each must have been
            measured: a figure that is missing or not a number fails.
        samples: by subject and domain ("" is all the text), the documents behind its errors; many where it is not
            said.
    """
    figures = {(m.name, m.subject): m for m in measurements}
    drawn_from = samples or {}
    checks: list[Check] = []

    def hold(key: str, limits: BaseModel, domain: str = "") -> None:
        limit, about = getattr(limits, key), LIMITS[key]
        if limit is not None:
            for subject in [about.subject] if about.subject else artifacts:
                figure = figures.get((about.figure + domain, subject))
                checks.append(drawn(key + domain, subject, about, limit, figure))

    def drawn(key: str, subject: str, about: Limit, limit: float | Bound, figure: Measurement | None) -> Check:
        sample = _sample(figure, drawn_from.get(subject, {}))
        value, accept = bound(limit, budget.accept)
        return _check(key, subject, about, value, figure, accept, budget.confidence, sample)

    for key in LIMITS:
        hold(key, budget)
    for domain, limits in budget.domains.items():
        for key in DomainLimits.model_fields:
            hold(key, limits, f"@{domain}")
    if budget.min_task_recovery is not None:
        asked = [key for key in figures if key[0].startswith("task_score@")]
        for name, subject in asked or [("task_score", artifacts[0])]:
            figure = figures.get((name.replace("task_score", "task_recovery", 1), subject))
            key = name.replace("task_score", "min_task_recovery", 1)
            check = drawn(key, subject, Limit("task_recovery"), budget.min_task_recovery, figure)
            float_score = figures.get((name.replace("task_score", "task_reference", 1), subject))
            if figure is None and float_score is not None:
                check = replace(check, note="not measured: the float model has no right answer")
            checks.append(check)
    speed = budget.min_decode_tokens_per_s
    if speed is not None:
        figure = figures.get(("decode_tokens_per_s", speed.where))
        checks.append(_check_speed(speed, figure))
    if budget.two_sided:
        checks += [c for s in artifacts for c in _two_sided(s, figures, drawn_from.get(s, {}).get(""), budget.accept)]
    if budget.structure:
        given = {"runtime_kl_excess"} if budget.max_runtime_kl is not None else set()
        checks += [c for s in artifacts for c in _structure(s, figures, given, budget.accept)]
    if budget.require_runner and (IN_RUNNER, artifacts[0]) not in figures:
        checks.append(replace(_failed(RUNNER, artifacts[0], "", 0, None, ""), note="not judged in its runner"))
    if budget.accept_not_known is not None:
        checks += [_known(s, figures, budget.accept_not_known, budget.accept) for s in artifacts]
    return Verdict(tuple(_with_remedy(check, figures) for check in checks))


def _with_remedy(check: Check, figures: Mapping[tuple[str, str], Measurement]) -> Check:
    if check.outcome != "failed" or check.value is None or check.note:
        return check
    return replace(check, note=remedy(check.name, check.limit, check.subject, figures))


def _sample(figure: Measurement | None, samples: Mapping[str, Sample]) -> Sample | None:
    """What is independent behind an error: each answer is, else the documents are; None where it is not said."""
    if figure is None or _drawn(figure) == "tokens":
        return samples.get("" if figure is None else figure.name.partition("@")[2])
    return None if figure.n is None else Sample(figure.n, figure.n - 1)


def _drawn(figure: Measurement) -> str:
    """What a figure's `n` counts."""
    if figure.name.startswith("task_"):
        return "questions"
    return "answers" if figure.name == "first_divergence" else "tokens"


def _check(
    key: str, subject: str, about: Limit, limit: float, figure: Measurement | None, accept: tuple[How, ...],
    confidence: float = 0.5, sample: Sample | None = None,
) -> Check:  # fmt: skip
    """Three outcomes: the data show that the limit holds, that it does not, or neither."""
    problem = _unusable(figure, accept)
    if figure is None or problem:
        return _failed(key, subject, about.unit, limit, figure, problem)
    at_most, value = key.startswith("max_"), figure.value
    margin = limit - value if at_most else value - limit
    if not about.drawn:
        outcome: Outcome = "passed" if margin >= 0 else "failed"
        return Check(
            key, subject, value, about.unit, limit, margin, margin >= 0, figure.how, outcome=outcome, by=figure.by
        )  # fmt: skip
    factor = multiplier(confidence, None if sample is None else sample.freedom)
    if sample is not None and _drawn(figure) == "tokens" and sample.documents < LEAST_DOCUMENTS:
        factor = math.inf
    spread = math.inf if figure.error is None or math.isinf(factor) else factor * figure.error
    outcome = "passed" if margin >= spread else "failed" if margin < -spread else "undecided"
    needed, note = None, ""
    if outcome == "undecided":
        needed, note = _too_few(figure, limit, factor, sample)
    low, high = (None, None) if not math.isfinite(spread) else (value - spread, value + spread)
    return Check(
        key, subject, value, about.unit, limit, margin, outcome == "passed", figure.how, figure.error, note, low, high,
        outcome, needed, figure.by,
    )  # fmt: skip


def _too_few(figure: Measurement, limit: float, factor: float, sample: Sample | None) -> tuple[int | None, str]:
    """How many would do, and the sentence that says so."""
    drawn = _drawn(figure)
    if drawn == "tokens" and (figure.error is None or not math.isfinite(factor)):
        there = "one" if sample is None else sample.documents
        return None, f"too few documents to tell: {there} of at least {LEAST_DOCUMENTS}; judge on the text of more"
    if figure.error is None or not math.isfinite(factor):
        return None, f"too few {drawn} to tell: one alone has no error"
    needed = enough(figure.value, figure.error, limit, factor, figure.n or 0)
    bounds = f"± {_quantity(factor * figure.error, figure.unit)}"
    if needed is None:
        return None, f"too few {drawn} to tell ({bounds}): the figure lies on the limit, no number would do"
    of = "" if sample is None or drawn != "tokens" else f" of {sample.documents} documents"
    more = " of as many more documents" if of else ""
    return needed, f"too few {drawn} to tell ({bounds} on {figure.n:,} {drawn}{of}); about {needed:,}{more} would do"


def _unusable(figure: Measurement | None, accept: Collection[How]) -> str:
    """Why a figure cannot be held against a limit; empty if it can."""
    if figure is None:
        return "not measured"
    if figure.how not in accept:
        by = f" by {figure.by}" if figure.by else ""
        return f"not {' or '.join(accept)} (only {figure.how}{by}: {figure.value:,.4g} {figure.unit})".replace(
            " )", ")"
        )
    if math.isfinite(figure.value):
        return ""
    return f"the figure is {figure.value}" + (f": {figure.note}" if figure.note else "")


def _failed(key: str, subject: str, unit: str, limit: float, figure: Measurement | None, problem: str) -> Check:
    """There is no figure that counts."""
    how, by = (None, "") if figure is None else (figure.how, figure.by)
    return Check(key, subject, None, unit, limit, None, False, how, note=problem, outcome="failed", by=by)


def _check_speed(limit: SpeedLimit, figure: Measurement | None) -> Check:
    """The lower end of the figure's interval counts."""
    key, unit = "min_decode_tokens_per_s", "tokens/s"
    problem = _unusable(figure, limit.accept)
    if figure is None or problem:
        return _failed(key, limit.where, unit, limit.at_least, figure, problem)
    sure = figure.value if figure.low is None else figure.low
    note = "" if figure.low is None else f"lower end of the interval around {figure.value:,.4g} {unit}"
    margin = sure - limit.at_least
    outcome: Outcome = "passed" if margin >= 0 else "failed"
    return Check(
        key, limit.where, sure, unit, limit.at_least, margin, margin >= 0, figure.how, figure.error, note,
        figure.low, figure.high, outcome, by=figure.by,
    )  # fmt: skip


def _is_number(error: float | None) -> TypeGuard[float]:
    return error is not None and not math.isnan(error)


def _two_sided(
    subject: str, figures: Mapping[tuple[str, str], Measurement], sample: Sample | None, accept: Collection[How]
) -> Iterable[Check]:
    """Quantization cannot make a model better, nor leave it as it was."""
    ratio, kl = figures.get(("perplexity_ratio", subject)), figures.get(("mean_kl", subject))
    for key, figure, limit in ((BETTER, ratio, 1.0), (SAME, kl, IDENTICAL)):
        if figure is not None and figure.how not in accept:
            yield _failed(key, subject, figure.unit, limit, figure, _unusable(figure, accept))
    if ratio is not None and ratio.how in accept and math.isfinite(ratio.value) and _is_number(ratio.error):
        factor = multiplier(SURE, None if sample is None else sample.freedom)
        # a change of the size of the KL may turn out that much for the better by luck
        luck = kl.value if kl is not None and math.isfinite(kl.value) else 0.0
        high = ratio.value + factor * ratio.error if ratio.error else ratio.value
        passed = high >= math.exp(-luck)
        told = f"perplexity {ratio.value:.5g} of the float model's (± {ratio.error:.2g})"
        note = told if passed else f"{told}: better beyond its error; text leaked, or this is another model"
        yield Check(
            BETTER, subject, ratio.value, "", 1.0, ratio.value - 1, passed, ratio.how, ratio.error, note, None, high,
            "passed" if passed else "failed", by=ratio.by,
        )  # fmt: skip
    if kl is not None and kl.how in accept and math.isfinite(kl.value):
        passed = kl.value > IDENTICAL
        note = "" if passed else "it answers exactly as the float model: is it quantized at all?"
        yield Check(
            SAME, subject, kl.value, kl.unit, IDENTICAL, kl.value - IDENTICAL, passed, kl.how, kl.error, note,
            outcome="passed" if passed else "failed", by=kl.by,
        )  # fmt: skip


def _known(
    subject: str,
    figures: Mapping[tuple[str, str], Measurement],
    accepted: Collection[str],
    accept: tuple[How, ...],
) -> Check:
    """What the files do not tell counts as not passed, but for the formats that may."""
    found = [m for (name, of), m in figures.items() if of == subject and name.startswith(f"{NOT_KNOWN}@")]
    figure = found[0] if len(found) == 1 else None
    check = _check(f"max_{NOT_KNOWN}", subject, Limit(NOT_KNOWN, "items", drawn=False), 0, figure, accept)
    if figure is None or check.passed:
        return check
    if figure.name.partition("@")[2] in accepted:
        return replace(check, passed=True, margin=0.0, outcome="passed", note=f"accepted: {figure.note}")
    return replace(check, note=figure.note)


def _structure(
    subject: str, figures: Mapping[tuple[str, str], Measurement], given: Collection[str], accept: tuple[How, ...]
) -> Iterable[Check]:
    """Fixed limits, but for those `given` by the budget."""
    for name, (limit, required) in STRUCTURE.items():
        figure = figures.get((name, subject))
        if name in given or (figure is None and not required):
            continue
        about = Limit(name, "" if figure is None else figure.unit, drawn=False)
        check = _check(f"max_{name}", subject, about, limit, figure, accept)
        note = figure.note if figure is not None and not check.passed and not check.note else check.note
        yield Check(**{**vars(check), "note": note})
