"""A budget: what an artifact must reach, and the verdict on whether it did."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError

from bluelm.errors import InputError
from eval.measurement import How, Measurement

DEFAULT_BUDGET = Path(__file__).parent / "data" / "budget.yaml"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Kinds = Annotated[tuple[How, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v), Field(min_length=1)]


class SpeedLimit(BaseModel):
    """So many tokens/s on the phone's chip or on this host; `accept` says which kinds of figure count."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    at_least: Positive
    where: Literal["soc", "host"] = "soc"
    accept: Kinds = ("measured",)


class Budget(BaseModel):
    """Limits; a limit that is not given is not checked. Accuracy limits hold for every artifact judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_perplexity_ratio: Positive | None = None
    max_mean_kl: Positive | None = None
    max_p99_kl: Positive | None = None
    min_top1_agreement: Share | None = None
    max_prefill_decode_kl: Positive | None = None
    min_decode_tokens_per_s: SpeedLimit | None = None
    max_artifact_bytes: ByteSize | None = None
    max_memory_bytes: ByteSize | None = None

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a YAML file.

        Raises:
            InputError: no such file, not YAML, an unknown key (a near one is suggested), a bad value.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the budget cannot be read: {error}", where=path, fix="name a YAML file") from error
        except yaml.YAMLError as error:
            raise InputError(f"the budget is not YAML: {error}", where=path, fix="mend the file") from error
        if not isinstance(content, dict) or not content:
            fix = f"write limits such as those in {DEFAULT_BUDGET}"
            raise InputError("the budget holds no limits", where=path, fix=fix)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise _explain(error, path) from error


@dataclass(frozen=True)
class Check:
    """One limit held against one figure.

    Attributes:
        name: the budget's key. subject: what it was held against ("npu", "cpu", "soc", "files" ...).
        value: the figure, None when it was not measured. unit: its unit. error: its standard error.
        limit: the limit. margin: how far inside the limit (negative: by how much it failed), None
            when not measured.
        how: how the figure was got. note: why it failed where that is not the number itself.
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

    def __str__(self) -> str:
        """One line: figure, limit, and by how much."""
        title = f"{self.name} ({self.subject})"
        bound = "at most" if self.name.startswith("max_") else "at least"
        asked = f"{bound} {_quantity(self.limit, self.unit)}"
        if self.value is None or self.margin is None:
            return f"{title}: {self.note}; the budget asks for {asked}"
        found, note = _quantity(self.value, self.unit), f"; {self.note}" if self.note else ""
        if self.passed:
            return f"{title}: {found}, {asked}{note}"
        relative = abs(self.margin) / self.limit if self.limit else math.inf
        return f"{title}: {found}, {asked}: beyond by {_quantity(abs(self.margin), self.unit)} ({relative:.1%}){note}"


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


# budget key -> (measurement, unit, what it is held against; None: every artifact judged)
_LIMITS: dict[str, tuple[str, str, str | None]] = {
    "max_perplexity_ratio": ("perplexity_ratio", "", None),
    "max_mean_kl": ("mean_kl", "nats/token", None),
    "max_p99_kl": ("p99_kl", "nats/token", None),
    "min_top1_agreement": ("top1_agreement", "", None),
    "max_prefill_decode_kl": ("prefill_decode_kl", "nats/token", None),
    "max_artifact_bytes": ("artifact_bytes", "bytes", "files"),
    "max_memory_bytes": ("memory_bytes", "bytes", "soc"),
}


def judge(budget: Budget, measurements: Iterable[Measurement], artifacts: Sequence[str]) -> Verdict:
    """Hold every limit of the budget against its figures.

    Args:
        budget: the limits.
        measurements: the figures.
        artifacts: subjects that accuracy limits hold for, e.g. ("npu", "cpu"). Each must have been
            measured: a figure that is missing or not a number fails.
    """
    figures = {(m.name, m.subject): m for m in measurements}
    checks: list[Check] = []
    for key, (name, unit, subject) in _LIMITS.items():
        limit = getattr(budget, key)
        if limit is not None:
            subjects = (subject,) if subject else artifacts
            checks += [_check(key, s, unit, float(limit), figures.get((name, s))) for s in subjects]
    speed = budget.min_decode_tokens_per_s
    if speed is not None:
        figure = figures.get(("decode_tokens_per_s", speed.where))
        checks.append(_check("min_decode_tokens_per_s", speed.where, "tokens/s", speed.at_least, figure, speed.accept))
    return Verdict(tuple(checks))


def _check(
    key: str,
    subject: str,
    unit: str,
    limit: float,
    figure: Measurement | None,
    accept: Sequence[How] | None = None,
) -> Check:
    if figure is None:
        return Check(key, subject, None, unit, limit, None, False, note="not measured")
    if accept is not None and figure.how not in accept:
        note = f"not {' or '.join(accept)} (only {figure.how}: {figure.value:,.4g} {figure.unit})"
        return Check(key, subject, None, unit, limit, None, False, figure.how, note=note)
    if not math.isfinite(figure.value):
        note = f"the figure is {figure.value}"
        return Check(key, subject, None, unit, limit, None, False, figure.how, note=note)
    if key.startswith("max_"):
        margin = limit - figure.value
        return Check(key, subject, figure.value, unit, limit, margin, margin >= 0, figure.how, figure.error)
    sure = figure.value if figure.low is None else figure.low  # the gate takes the interval's lower end
    note = "" if figure.low is None else f"lower end of the interval around {figure.value:,.4g} {unit}"
    margin = sure - limit
    return Check(key, subject, sure, unit, limit, margin, margin >= 0, figure.how, figure.error, note)


def _explain(error: ValidationError, path: Path) -> InputError:
    """The first thing that pydantic found wrong, an unknown key before all else, in the user's words."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path_of_key = [str(part) for part in first["loc"]]
    key = ".".join(path_of_key)
    where = f"{path}, key {key}"
    if first["type"] == "extra_forbidden":
        known = list(SpeedLimit.model_fields if len(path_of_key) > 1 else Budget.model_fields)
        near = difflib.get_close_matches(path_of_key[-1], known, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return InputError("the budget has an unknown key", where=where, fix=fix)
    if first["type"] == "missing":
        return InputError("the budget lacks a value", where=where, fix=f"give {path_of_key[-1]}")
    problem = f"the budget's {key} cannot be {first['input']!r}: {first['msg']}"
    return InputError(problem, where=where, fix="mend the value")
