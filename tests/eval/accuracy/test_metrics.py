"""Metrics against sums written out in plain Python, and standard errors against simulation."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eval.accuracy import metrics

LOGITS = hnp.arrays(np.float32, (4, 7), elements=st.floats(-30, 30, width=32))


def plain_log_softmax(row: list[float]) -> list[float]:
    """log p_i = x_i - log(sum exp x_j), with math.fsum: an independent float64 computation."""
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row)) + top
    return [x - total for x in row]


@settings(max_examples=50)
@given(LOGITS, LOGITS)
def test_kl_and_likelihood_equal_the_sums_written_out(p_logits: np.ndarray, q_logits: np.ndarray) -> None:
    p, q = metrics.log_softmax(p_logits), metrics.log_softmax(q_logits)
    targets = np.array([0, 6, 3, 1])
    kl = metrics.kl_divergence(p, q)
    nll = metrics.negative_log_likelihood(q, targets)
    for i in range(4):
        log_p, log_q = plain_log_softmax(p_logits[i].tolist()), plain_log_softmax(q_logits[i].tolist())
        expected = math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        assert kl[i] == pytest.approx(max(expected, 0), abs=1e-12, rel=1e-9)
        assert nll[i] == pytest.approx(-log_q[targets[i]], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 100])
def test_a_few_rows_at_a_time_give_what_all_at_once_give(rows: int) -> None:
    generator = np.random.default_rng(rows)
    p, q = (generator.normal(0, 3, (rows, 50)).astype(np.float32) for _ in range(2))
    targets = generator.integers(0, 50, rows)
    whole = metrics.log_softmax(p), metrics.log_softmax(q)
    assert (metrics.kl_of_logits(p, q) == metrics.kl_divergence(*whole)).all()
    assert (metrics.nll_of_logits(q, targets) == metrics.negative_log_likelihood(whole[1], targets)).all()


def test_no_more_than_a_few_rows_are_held_in_float64() -> None:
    rows, vocabulary = 512, 4096
    logits = np.ones((rows, vocabulary), np.float32)
    tracemalloc.start()
    metrics.kl_of_logits(logits, logits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * metrics.FEW_ROWS * 8 * vocabulary


def test_known_kl() -> None:
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert metrics.kl_divergence(metrics.log_softmax(p), metrics.log_softmax(q))[0] == pytest.approx(expected)


def test_kl_is_exact_for_logits_that_float32_cannot_tell_apart() -> None:
    """A shift of 1e-4 beside logits of 1e4: float32 softmax would lose it."""
    p = np.array([[1e4, 1e4 + 1e-4]])
    q = np.array([[1e4, 1e4]])
    a = 1 / (1 + math.exp(1e-4))
    expected = a * math.log(a / 0.5) + (1 - a) * math.log((1 - a) / 0.5)
    assert metrics.kl_divergence(metrics.log_softmax(p), metrics.log_softmax(q))[0] == pytest.approx(expected, rel=1e-3)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    nll = metrics.negative_log_likelihood(metrics.log_softmax(np.zeros((10, 50))), np.arange(10))
    perplexity = metrics.exp_mean(nll, np.arange(10))
    assert perplexity.value == pytest.approx(50)
    assert perplexity.error == pytest.approx(0, abs=1e-9)


def test_agreement_counts_equal_tops() -> None:
    a = np.array([[1, 2, 3], [3, 2, 1], [1, 5, 2]])
    b = np.array([[0, 0, 9], [0, 0, 9], [1, 2, 0]])
    assert metrics.top1_agreement(a, b).tolist() == [1, 0, 1]


def test_non_finite_logits_give_a_non_finite_kl() -> None:
    bad = np.array([[np.nan, 1.0]])
    assert math.isnan(metrics.kl_divergence(metrics.log_softmax(np.zeros((1, 2))), metrics.log_softmax(bad))[0])


def correlated(generator: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Values that share an effect within their cluster; clusters of 5 to 40 values."""
    sizes = generator.integers(5, 41, groups)
    clusters = np.repeat(np.arange(groups), sizes)
    effects = generator.normal(0, 1, groups)
    return effects[clusters] + generator.normal(2, 1, len(clusters)), clusters


def test_clustered_error_is_the_spread_of_repeated_draws() -> None:
    generator = np.random.default_rng(0)
    draws = [metrics.mean(*correlated(generator, 40)) for _ in range(800)]
    spread = np.std([d.value for d in draws])
    told = np.sqrt(np.mean([d.error**2 for d in draws if d.error is not None]))
    assert told == pytest.approx(spread, rel=0.1)
    values, clusters = correlated(generator, 40)
    naive = values.std() / math.sqrt(len(values))
    clustered = metrics.mean(values, clusters).error
    assert clustered is not None
    assert clustered > 2 * naive  # what ignoring the clusters would hide


def test_perplexity_error_is_the_spread_of_repeated_draws() -> None:
    generator = np.random.default_rng(1)
    draws = [metrics.exp_mean(*correlated(generator, 60)) for _ in range(600)]
    told = np.median([d.error for d in draws if d.error is not None])
    spread = np.subtract(*np.percentile([d.value for d in draws], [84.13, 15.87])) / 2
    assert told == pytest.approx(spread, rel=0.12)


def test_quantile_error_is_the_spread_of_repeated_draws() -> None:
    generator = np.random.default_rng(2)
    draws = []
    for _ in range(300):
        values, clusters = correlated(generator, 150)
        draws.append(metrics.quantile(np.exp(values), clusters, 0.9))
    told = np.mean([d.error for d in draws if d.error is not None])
    assert told == pytest.approx(np.std([d.value for d in draws]), rel=0.15)


def test_singleton_clusters_give_the_textbook_error() -> None:
    values = np.random.default_rng(3).normal(size=100)
    found = metrics.mean(values, np.arange(100))
    assert found.error == pytest.approx(values.std(ddof=1) / 10)


def test_one_cluster_has_no_error() -> None:
    assert metrics.mean(np.ones(9), np.zeros(9, dtype=np.int64)).error is None


def test_top_k_overlap_counts_the_tokens_that_both_rate_among_the_best() -> None:
    a = np.array([[9, 8, 7, 6, 5, 0, 0.0], [9, 8, 7, 6, 5, 0, 0]])
    b = np.array([[5, 6, 7, 8, 9, 0, 0.0], [9, 8, 7, 0, 0, 6, 5]])
    assert metrics.top_k_overlap(a, b).tolist() == [1, 0.6]
    assert metrics.top_k_overlap(a[:, :3], b[:, :3], 5).tolist() == [1, 1]  # fewer tokens than k


def test_maximum_has_the_spread_of_repeated_draws_as_error() -> None:
    generator = np.random.default_rng(4)
    clusters = np.repeat(np.arange(80), 50)
    draws = [metrics.maximum(generator.exponential(1, len(clusters)), clusters) for _ in range(400)]
    told = np.mean([d.error for d in draws if d.error is not None])
    assert told == pytest.approx(np.std([d.value for d in draws]), rel=0.15)
    assert metrics.maximum(np.array([1.0, 3, 2]), np.zeros(3, np.int64)) == metrics.Estimate(3, None, 3)
    assert math.isnan(metrics.maximum(np.array([1.0, np.nan]), np.arange(2)).value)


def test_the_error_of_a_mean_of_two_unequal_clusters_by_hand() -> None:
    """m = 13 / 5, residuals 0.4 and -0.4; shares 0.2 and 0.8 are corrected by 1 / 0.8 and 1 / 0.08."""
    found = metrics.ratio_mean(np.array([3.0, 10.0]), np.array([1, 4]))
    assert (found.value, found.n) == (2.6, 5)
    assert found.error == pytest.approx(math.sqrt(0.16 * (1.25 + 12.5)) / 5)


def test_means_of_one_value_of_none_and_far_from_zero() -> None:
    assert metrics.mean(np.array([3.0]), np.array([0])) == metrics.Estimate(3.0, None, 1)
    with pytest.raises(ValueError, match="no values"):
        metrics.mean(np.array([]), np.array([], np.int64))
    noise, clusters = np.random.default_rng(5).normal(0, 1e-4, 20_000), np.repeat(np.arange(20), 1000)
    near, far = metrics.mean(noise, clusters), metrics.mean(1e10 + noise, clusters)
    assert far.error == pytest.approx(near.error, rel=0.03)  # 1e10 holds 2e-6; sums of thousands of it 2e-3


def test_the_error_of_a_quantile_by_hand() -> None:
    """Six of ten are at or below the median 0, with an error of sqrt(0.6 * 0.4 / 9)."""
    values, each = np.array([0, 0, 0, 0, 0, 0, 1, 2, 3, 4.0]), np.arange(10)
    found, away = metrics.quantile(values, each, 0.5), math.sqrt(0.24 / 9)
    assert (found.value, found.n) == (0, 10)
    assert found.error == pytest.approx(((0.5 + away) * 9 - 5) / 2)
    with np.errstate(invalid="ignore"):
        endless = metrics.quantile(np.array([1, 2, math.inf]), np.arange(3), 0.9)
    assert (math.isfinite(endless.value), endless.error, endless.n) == (False, None, 3)
    top = metrics.quantile(np.arange(4.0), np.arange(4), 0.9)  # the upper end lies above all values
    assert top.error == pytest.approx((3 - 3 * 0.65) / 2)


@pytest.mark.parametrize(("largest", "excess"), [
    ([1, 3], 2),  # one above the next
    ([4, 1, 9, 2], (9 + 4) / 2 - 2),  # half of the clusters
    ([n**2 for n in range(30)], sum(n**2 for n in range(20, 30)) / 10 - 19**2),  # ten
])  # fmt: skip
def test_the_error_of_a_maximum_by_hand(largest: list[int], excess: float) -> None:
    values = np.array([value - lower for value in largest for lower in (1, 0)], np.float64)
    found = metrics.maximum(values, np.repeat(np.arange(len(largest)), 2))
    assert (found.value, found.n) == (max(largest), len(values))
    assert found.error == pytest.approx(excess * math.pi / math.sqrt(6))
