"""Corrections, degrees of freedom, quantiles and numbers of tokens by known answers; ends of ranges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from eval.budget.confidence import Sample, correction, enough, multiplier, sample_of, student_quantile


def test_a_large_cluster_is_corrected_by_the_larger_of_two() -> None:
    """w = 0.7: 2 w - sum w^2 = 0.88 takes more than w; w = 0.1: w takes more than 2 w - sum w^2 = -0.32."""
    assert correction(np.array([0.7, 0.1, 0.1, 0.1])) == pytest.approx([1 / 0.12, *[1 / 0.9] * 3])
    assert correction(np.full(4, 0.25)) == pytest.approx(4 / 3)


def test_degrees_of_freedom_at_the_ends() -> None:
    assert sample_of([]) == Sample(0, 0.0)
    assert sample_of([9]) == Sample(1, 0.0)
    two = sample_of([5, 0, 5])  # a document without a value tells nothing
    assert (two.documents, two.freedom) == (2, pytest.approx(1))
    for large in (1e4, 1e5, 1e6, 1e7):
        assert 1 <= sample_of([large, *[1] * 50]).freedom < 1.0001


@pytest.mark.parametrize(("level", "freedom", "value"), [
    (0.95, 3, 2.3523409703937),
    (0.999, 3, 9.9337255088782),
    (0.9, 4, 1.5331302352423),
])  # fmt: skip
def test_the_expansion_is_the_published_one(level: float, freedom: float, value: float) -> None:
    """The values: 26.7.5 worked out with 30 digits."""
    assert student_quantile(level, freedom) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("freedom", [1, 2, 30, 200])
def test_quantiles_of_one_and_two_and_many_degrees(freedom: int) -> None:
    for level in (0.9, 0.95, 0.999):
        near = 1e-9 if freedom < 3 else 1e-4 * (30 / freedom) ** 5
        assert student_quantile(level, freedom) == pytest.approx(stats.t.ppf(level, freedom), rel=near)
    assert multiplier(0.95, 1) == pytest.approx(6.3138, abs=1e-4)
    assert multiplier(0.95, 0.99) == math.inf


def test_numbers_of_tokens_are_rounded_up_to_two_digits() -> None:
    assert enough(0, 0.02, 0.01, 2, 123) == 2000  # 123 (2 * 0.02 / 0.01)^2 = 1968
    assert enough(0, 0.0303, 0.01, 1, 123) == 1200  # 1129.3
    assert enough(0, 0.23, 1, 1, 100) == 6  # 5.29: below ten every number counts
    assert enough(0, 0.01, 1, 1, 100) == 1
    assert enough(1, 1, 2, 1, 10**15) == 10**15
    assert enough(1, 1, 2, 1, 11 * 10**14) is None
