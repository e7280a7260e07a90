"""A budget: what an artifact must reach, and the verdict on whether it did.

A figure with a standard error is held against its limit by its confidence bounds: it passes when the bound on the far
side holds the limit, it fails when the data show that it does not, and between the two there are too few tokens to
tell, which is no pass either.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from eval.confidence import LEAST_DOCUMENTS, Sample, enough, multiplier
from eval.measurement import How, Measurement
from export.artifact import Format

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Bytes = Annotated[
    ByteSize, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}], "examples": ["4 GB"]})
]
_HOWS = {"enum": ["measured", "emulated", "estimated"]}
Kinds = Annotated[
    tuple[How, ...],
    BeforeValidator(lambda v: (v,) if isinstance(v, str) else v),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_HOWS, {"type": "array", "items": _HOWS, "minItems": 1}]}),
]
EVERY: tuple[How, ...] = ("measured", "emulated", "estimated")
Outcome = Literal["passed", "failed", "undecided"]
SURE = 0.999  # confidence from which an artifact that is better than the float model is suspect
IDENTICAL = 1e-9  # nats: quantized weights differ from float ones by more, rounding in float32 by less


class _Bound(BaseModel):
    """A limit that says which kinds of figure may pass; without `accept`, those of the budget."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    accept: Kinds | None = None

    @property
    def number(self) -> float:
        return float(next(value for key, value in self if key != "accept"))


class AtMost(_Bound):
    """The largest value that passes."""

    at_most: Positive


class AtMostBytes(_Bound):
    """The most bytes that pass."""

    at_most: Bytes


class AtLeast(_Bound):
    """The smallest value that passes."""

    at_least: Positive


class AtLeastShare(_Bound):
    """The smallest share that passes."""

    at_least: Share


class SpeedLimit(BaseModel):
    """So many tokens/s on the phone's chip or on this host; `accept` says which kinds of figure count."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    at_least: Positive
    where: Literal["soc", "host"] = "soc"
    accept: Kinds = ("measured",)


def _form(value: Any) -> str:
    return MAPPING if isinstance(value, dict | BaseModel) else NUMBER


MAPPING, NUMBER = "mapping", "number"  # the two forms of a limit: with and without `accept`
_FORM = Discriminator(_form)
_MAPPING, _NUMBER = Tag(MAPPING), Tag(NUMBER)
Most = Annotated[Annotated[Positive, _NUMBER] | Annotated[AtMost, _MAPPING], _FORM]
MostBytes = Annotated[Annotated[Bytes, _NUMBER] | Annotated[AtMostBytes, _MAPPING], _FORM]
Least = Annotated[Annotated[Positive, _NUMBER] | Annotated[AtLeast, _MAPPING], _FORM]
LeastShare = Annotated[Annotated[Share, _NUMBER] | Annotated[AtLeastShare, _MAPPING], _FORM]


class DomainLimits(BaseModel):
    """Limits on the text of one domain."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_perplexity_ratio: Most | None = None
    max_mean_kl: Most | None = None
    min_top1_agreement: LeastShare | None = None
    min_top5_agreement: LeastShare | None = None


class Budget(DomainLimits):
    """Limits; a limit that is not given is not checked. Accuracy limits hold for every artifact judged."""

    confidence: Annotated[float, Field(gt=0.5, lt=1, description="of each bound, on one side")] = 0.95
    accept: Annotated[Kinds, Field(description="kinds of figure that may pass where a limit does not say")] = EVERY
    max_p99_kl: Most | None = None
    max_max_kl: Most | None = None
    min_first_divergence: Least | None = None
    domains: Annotated[dict[str, DomainLimits], Field(description="limits by domain of the text")] = {}
    max_prefill_decode_kl: Most | None = None
    max_runtime_kl: Annotated[
        Most | None, Field(description="to the artifact's own weights; default: what its format may cost")
    ] = None
    min_decode_tokens_per_s: SpeedLimit | None = None
    max_artifact_bytes: MostBytes | None = None
    max_memory_bytes: MostBytes | None = None
    min_npu_node_share: LeastShare | None = None
    min_npu_mac_share: LeastShare | None = None
    min_prefill_coverage: Annotated[LeastShare | None, Field(description="of the context's positions")] = None
    min_decode_coverage: Annotated[LeastShare | None, Field(description="of the context's positions")] = None
    min_task_recovery: Annotated[
        LeastShare | None, Field(description="score of the artifact / score of the float model, in every task")
    ] = None
    two_sided: Annotated[bool, Field(description="better than float, or identical to it, fails")] = True
    structure: Annotated[bool, Field(description="tokenizer, template, weights, versions and size must be right")] = (
        True
    )
    accept_not_known: Annotated[
        tuple[Format, ...] | None,
        Field(description="formats that may pass though their files do not tell all that they hold; default: any"),
    ] = None


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


class Limit(NamedTuple):
    """What a key of the budget limits: a figure, of one subject (None: of every artifact judged)."""

    figure: str
    unit: str = ""
    subject: str | None = None
    drawn: bool = True  # from a sample of text, so without an error nothing is known


_LIMITS: dict[str, Limit] = {
    "max_perplexity_ratio": Limit("perplexity_ratio"),
    "max_mean_kl": Limit("mean_kl", "nats/token"),
    "max_p99_kl": Limit("p99_kl", "nats/token"),
    "max_max_kl": Limit("max_kl", "nats/token"),
    "min_top1_agreement": Limit("top1_agreement"),
    "min_top5_agreement": Limit("top5_agreement"),
    "min_first_divergence": Limit("first_divergence", "tokens"),
    "max_prefill_decode_kl": Limit("prefill_decode_kl", "nats/token", drawn=False),
    "max_runtime_kl": Limit("runtime_kl", "nats/token", drawn=False),
    "min_prefill_coverage": Limit("prefill_coverage", drawn=False),
    "min_decode_coverage": Limit("decode_coverage", drawn=False),
    "max_artifact_bytes": Limit("artifact_bytes", "bytes", "files", drawn=False),
    "max_memory_bytes": Limit("memory_bytes", "bytes", "soc", drawn=False),
    "min_npu_node_share": Limit("npu_node_share", "", "npu", drawn=False),
    "min_npu_mac_share": Limit("npu_mac_share", "", "npu", drawn=False),
}
# figures that no budget sets: (limit, whether every artifact must have it measured)
STRUCTURE: dict[str, tuple[float, bool]] = {
    "tokenizer_mismatches": (0, True),
    "chat_template_mismatches": (0, True),
    "end_token_faults": (0, True),
    "versions_missing": (0, True),
    "files_changed": (0, False),
    "weight_mismatches": (0, False),  # where the quantized checkpoint is not at hand it is not known
    "bits_per_weight_deviation": (0.02, False),
    "block_error_excess": (1, False),
    "runtime_kl_excess": (1, False),
    "position_kl_excess": (1, False),
    "reference_to_guess": (1, False),  # of codes that came with the checkpoint: eval/sanity.py
    "compiled_mismatches": (0, False),
    "twin_block_excess": (1, False),
}
BETTER, SAME = "not_better_than_float", "not_identical_to_float"
NOT_KNOWN = "not_known"  # @format: items that an artifact must hold and its files do not tell


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
        limit, about = getattr(limits, key), _LIMITS[key]
        if limit is not None:
            for subject in [about.subject] if about.subject else artifacts:
                figure = figures.get((about.figure + domain, subject))
                checks.append(drawn(key + domain, subject, about, limit, figure))

    def drawn(key: str, subject: str, about: Limit, limit: float | _Bound, figure: Measurement | None) -> Check:
        sample = _sample(figure, drawn_from.get(subject, {}))
        value, accept = _bound(limit, budget.accept)
        return _check(key, subject, about, value, figure, accept, budget.confidence, sample)

    for key in _LIMITS:
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
    if budget.accept_not_known is not None:
        checks += [_known(s, figures, budget.accept_not_known, budget.accept) for s in artifacts]
    return Verdict(tuple(checks))


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


def number_of(limit: float | _Bound) -> float:
    """A limit's number, in whichever form it was given."""
    return _bound(limit, ())[0]


def _bound(limit: float | _Bound, accept: tuple[How, ...]) -> tuple[float, tuple[How, ...]]:
    """A limit's number, and the kinds of figure that may pass it; `accept`: the budget's own."""
    if isinstance(limit, _Bound):
        return limit.number, limit.accept or accept
    return float(limit), accept


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
