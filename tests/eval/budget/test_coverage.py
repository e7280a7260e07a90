"""Bounds hold as often as they say: documents drawn from a known population, whose windows resemble each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from eval.accuracy import metrics
from eval.budget.confidence import LEAST_DOCUMENTS, multiplier, sample_of

DRAWS = 2000
CONFIDENCE = 0.95
TOKENS = 32  # in a window
TRUTH = 0.01  # nats a token
Sizes = Callable[[np.random.Generator], np.ndarray]


def draw(generator: np.random.Generator, windows: np.ndarray, skewed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sums of KL by window, and the document of each: two windows of one document correlate with 0.7.

    Window sums have mean TRUTH * TOKENS; normal, or skewed to the right as measured ones are (gamma of shape 4).
    """
    document = np.repeat(np.arange(len(windows)), windows)
    if skewed:
        shared = generator.gamma(4, 1 / 4, len(windows)) - 1  # variance 1/4
        own = generator.gamma(4 * 7 / 3, 3 / 28, len(document)) - 1  # variance 3/28, which is 3/7 of it
    else:
        shared = generator.normal(0, 1 / 2, len(windows))
        own = generator.normal(0, np.sqrt(3 / 28), len(document))
    return TRUTH * TOKENS * (1 + shared[document] + own), document


def coverage(sizes: Sizes, by_document: bool = True, skewed: bool = False) -> tuple[float, float]:
    """How often the truth lies below the upper bound, and above the lower one."""
    generator = np.random.default_rng(0)
    below = above = 0
    for _ in range(DRAWS):
        sums, document = draw(generator, sizes(generator), skewed)
        counts = np.full(len(sums), TOKENS)
        if by_document:
            sums, counts = np.bincount(document, weights=sums), np.bincount(document) * TOKENS
        found = metrics.ratio_mean(sums, counts)
        assert found.error is not None
        spread = multiplier(CONFIDENCE, sample_of(counts).freedom) * found.error
        below += found.value + spread >= TRUTH
        above += found.value - spread <= TRUTH
    return below / DRAWS, above / DRAWS


def equal(generator: np.random.Generator) -> np.ndarray:
    return np.full(40, 4)


def unequal(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(1, 9, 40)


def few(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(2, 5, LEAST_DOCUMENTS + 2)


def one_long(generator: np.random.Generator) -> np.ndarray:
    return np.array([40, *[2] * 40])


@pytest.mark.parametrize("skewed", [False, True])
def test_the_windows_correlate_as_said(skewed: bool) -> None:
    sums, _ = draw(np.random.default_rng(1), np.full(20000, 2), skewed)
    assert np.corrcoef(sums.reshape(-1, 2).T)[0, 1] == pytest.approx(0.7, abs=0.02)
    assert sums.mean() / TOKENS == pytest.approx(TRUTH, rel=0.02)


@pytest.mark.parametrize("sizes", [equal, unequal, few])
def test_bounds_by_document_hold_as_often_as_they_say(sizes: Sizes) -> None:
    """Three standard errors of the simulation are 0.015."""
    assert coverage(sizes) == pytest.approx((CONFIDENCE, CONFIDENCE), abs=0.015)


def test_a_document_that_outweighs_the_others_makes_bounds_wider_not_wrong() -> None:
    assert min(coverage(one_long)) > CONFIDENCE - 0.015


@pytest.mark.parametrize("sizes", [equal, unequal, few])
def test_skewed_documents_cost_the_upper_bound_little(sizes: Sizes) -> None:
    below, above = coverage(sizes, skewed=True)
    assert below > CONFIDENCE - 0.035
    assert above > CONFIDENCE


@pytest.mark.parametrize("sizes", [equal, unequal, one_long])
@pytest.mark.parametrize("skewed", [False, True])
def test_bounds_by_window_would_be_wrong_far_too_often(sizes: Sizes, skewed: bool) -> None:
    assert max(coverage(sizes, by_document=False, skewed=skewed)) < 0.88
