"""How far one model's logits are from another's, with standard errors: pure functions on arrays.

Tokens of one document resemble each other, and so do its windows, so every standard error is clustered: the document,
not the token or the window, is what was drawn at random. All arithmetic is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.budget.confidence import correction

FEW_ROWS = 32  # of a vocabulary in float64 at a time: of 100,000 tokens, 256 rows and what is made of them take a GB
Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A statistic, its standard error (None with fewer than two clusters) and the observations behind it."""

    value: float
    error: float | None
    n: int


def log_softmax(logits: NDArray) -> Float:
    """Log-probabilities [n, vocab] of logits [n, vocab]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def negative_log_likelihood(log_probabilities: Float, targets: Int) -> Float:
    """Nats [n] that log-probabilities [n, vocab] give to the tokens [n] that came."""
    return -np.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]


def nll_of_logits(logits: NDArray, targets: Int) -> Float:
    """`negative_log_likelihood` of logits [n, vocab], a few rows in float64 at a time."""
    parts = [
        negative_log_likelihood(log_softmax(logits[i : i + FEW_ROWS]), targets[i : i + FEW_ROWS])
        for i in range(0, max(len(logits), 1), FEW_ROWS)
    ]
    return np.concatenate(parts)


def kl_divergence(reference: Float, candidate: Float) -> Float:
    """KL(reference || candidate) in nats [n] of log-probabilities [n, vocab]; never below zero."""
    return np.maximum((np.exp(reference) * (reference - candidate)).sum(axis=-1), 0.0)


def kl_of_logits(reference: NDArray, candidate: NDArray) -> Float:
    """`kl_divergence` of logits [n, vocab], a few rows in float64 at a time."""
    parts = [
        kl_divergence(log_softmax(reference[i : i + FEW_ROWS]), log_softmax(candidate[i : i + FEW_ROWS]))
        for i in range(0, max(len(reference), 1), FEW_ROWS)
    ]
    return np.concatenate(parts)


def top1_agreement(reference: NDArray, candidate: NDArray) -> Float:
    """1.0 where the two rate the same token highest, else 0.0: [n] of scores [n, vocab]."""
    return (reference.argmax(axis=-1) == candidate.argmax(axis=-1)).astype(np.float64)


def top_k_overlap(reference: NDArray, candidate: NDArray, k: int = 5) -> Float:
    """Share of the reference's k best tokens that are among the candidate's k best: [n] of scores [n, vocab]."""
    k = min(k, reference.shape[-1])
    best = [np.argpartition(scores, -k, axis=-1)[:, -k:] for scores in (reference, candidate)]  # [n, k] each
    return (best[0][:, :, None] == best[1][:, None, :]).any(axis=-1).mean(axis=-1)


def mean(values: Float, clusters: Int) -> Estimate:
    """Mean over all tokens, with the clustered standard error of a ratio (`ratio_mean`).

    Args:
        values: float64 [n].
        clusters: int64 [n], which cluster each value belongs to.
    """
    if len(values) == 0:
        raise ValueError("no values to average")
    _, index = np.unique(clusters, return_inverse=True)
    average = float(values.mean())
    found = ratio_mean(np.bincount(index, weights=values - average), np.bincount(index))  # centred: no digits are lost
    return Estimate(average, found.error, len(values))


def ratio_mean(sums: NDArray, counts: NDArray) -> Estimate:
    """Mean over all values of clusters that are known by their sums S_c and counts n_c alone.

    m = sum S_c / N and se^2 = sum_c a_c (S_c - m n_c)^2 / N^2 for N values (Cochran, Sampling Techniques, 3rd ed.,
    1977, eq. 6.9 and 9.29), where a_c makes up for clusters that draw the mean to themselves (`confidence.correction`;
    G / (G - 1) for G clusters of one size, the CR1 form of Liang and Zeger 1986).

    Args:
        sums: float64 [clusters]. counts: values in each, [clusters], above zero.
    """
    total = float(counts.sum())
    average = float(sums.sum()) / total
    if len(counts) < 2:
        return Estimate(average, None, int(total))
    residuals = sums - average * counts
    error = math.sqrt(float((correction(counts / total) * residuals**2).sum())) / total
    return Estimate(average, error, int(total))


def exp_mean(values: Float, clusters: Int) -> Estimate:
    """exp of the mean, the error by the delta method: se(exp m) = exp(m) se(m).

    Of negative log-likelihoods this is perplexity; of paired differences of them, the perplexity ratio,
    whose error is far smaller than that of either perplexity because both are read on the same tokens.
    """
    inner = mean(values, clusters)
    value = float(np.exp(inner.value))  # np: overflows to inf where math.exp would raise
    return Estimate(value, None if inner.error is None else value * inner.error, inner.n)


def quantile(values: Float, clusters: Int, q: float) -> Estimate:
    """The q-quantile, with Woodruff's standard error.

    The share of values at or below the quantile has a clustered standard error s; half the distance
    between the (q - s)- and the (q + s)-quantile is the error (Woodruff 1952, JASA 47:635).
    """
    value = float(np.quantile(values, q))
    share = mean((values <= value).astype(np.float64), clusters)
    if share.error is None or not np.isfinite(values).all():
        return Estimate(value, None, len(values))
    low, high = np.quantile(values, [max(q - share.error, 0.0), min(q + share.error, 1.0)])
    return Estimate(value, float(high - low) / 2, len(values))


def maximum(values: Float, clusters: Int) -> Estimate:
    """The largest value; its error as if the clusters' largest values had an exponential tail.

    With m_1 >= m_2 >= ... the k + 1 largest of the clusters' maxima, the mean excess s = mean(m_1..m_k) - m_(k+1)
    estimates the tail's scale and s * pi / sqrt(6) the standard deviation of the largest (Weissman 1978, JASA
    73:812); k is 10, or half of the clusters where there are few.
    """
    if not np.isfinite(values).all():
        return Estimate(float(values.max()), None, len(values))
    value = float(values.max())
    _, index = np.unique(clusters, return_inverse=True)
    largest = np.full(int(index.max()) + 1, -np.inf)
    np.maximum.at(largest, index, values)
    k = min(10, len(largest) // 2)
    if k < 1:
        return Estimate(value, None, len(values))
    top = np.sort(largest)[::-1][: k + 1]
    return Estimate(value, float(top[:k].mean() - top[k]) * math.pi / math.sqrt(6), len(values))
