"""Checks before a run that there is enough text to decide every limit of a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist

import numpy as np

from bluelm.errors import InputError
from eval.budget.confidence import LEAST_DOCUMENTS
from eval.budget.limits import Budget, DomainLimits, number_of
from eval.heldout import HeldOut, Window

ACCURACY = ("max_p99_kl", "max_max_kl", *DomainLimits.model_fields)  # limits on figures that text is drawn for
AGREEMENT = ("min_top1_agreement", "min_top5_agreement")


def check_text(held_out: HeldOut, budget: Budget, tokens: Mapping[str, int]) -> None:
    """Make sure that every limit could be decided.

    Args:
        tokens: option -> tokens that an artifact is judged on.

    Raises:
        InputError: too few documents or tokens, of all the text or of a domain that has limits; the number that would
            do is named.
    """
    for option, count in tokens.items():
        problem = lacking(held_out.first(count), budget)
        if problem is None:
            continue
        whole = lacking(held_out.windows, budget)
        if whole is not None:
            fix = (
                "give more with --eval: in .jsonl each record is a document, else each file; or a budget without limits"
            )
            raise InputError(f"too little text to judge on: {whole}", where=held_out.source, fix=fix)
        raise InputError(
            f"{option} {count} leaves too little text to judge on: {problem}",
            where=held_out.source,
            fix=f"give {option} {_enough(held_out, budget)} or more",
        )


def lacking(windows: Sequence[Window], budget: Budget) -> str | None:
    """What the windows lack for the budget's limits; None for nothing."""
    for domain, limits in (("", budget), *budget.domains.items()):
        given = [name for name in ACCURACY if getattr(limits, name, None) is not None]
        if not given:
            continue
        part = [window for window in windows if domain in ("", window.domain)]
        of = f" of {domain}" if domain else ""
        documents = len({n for w in part for n in np.unique(w.documents[1:][w.judged[1:]]).tolist()})
        if documents < LEAST_DOCUMENTS:
            return f"{documents} documents{of}, and {given[0]} needs at least {LEAST_DOCUMENTS}"
        tokens = sum(int(window.judged[1:].sum()) for window in part)
        for name in AGREEMENT:
            limit = getattr(limits, name)
            if limit is None:
                continue
            number = number_of(limit)
            if tokens < (needed := _tokens_for(number, budget.confidence)):
                return f"{tokens} tokens{of}, and {name} {number:g} needs at least {needed}"
    return None


def _tokens_for(limit: float, confidence: float) -> int:
    """Tokens at which a share half-way between the limit and 1 would pass if they were independent: z^2 p q / d^2."""
    if limit >= 1:
        return 1
    half = (1 + limit) / 2
    return math.ceil(NormalDist().inv_cdf(confidence) ** 2 * half * (1 - half) / (half - limit) ** 2)


def _enough(held_out: HeldOut, budget: Budget) -> int:
    """The fewest tokens from the front that would do."""

    def sums() -> Iterator[tuple[int, int]]:
        total = 0
        for index, window in enumerate(held_out.windows, 1):
            total += int(window.judged[1:].sum())
            yield index, total

    return next(total for index, total in sums() if lacking(held_out.windows[:index], budget) is None)
