"""Judging against models whose answers can be worked out by hand: tables of what follows two tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from bluelm.errors import TargetError
from eval.accuracy import judge, metrics
from eval.heldout import Window
from targets.runtime import RuntimeBase

VOCAB = 5


class TableRuntime(RuntimeBase):
    """A model of order 2: logits [VOCAB] from table[token before, token]; the last token is its cache."""

    def __init__(self, table: np.ndarray, *, forgets: bool = False) -> None:
        self.name, self.vocab_size, self.context = "table", table.shape[-1], 1000
        self._table, self._forgets = table, forgets
        self._last = 0

    def reset(self) -> None:
        self._last = 0

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        rows = []
        for token in tokens:
            rows.append(self._table[self._last, token])
            self._last = token
        return np.stack(rows).astype(np.float32)

    def decode(self, token: int) -> np.ndarray:
        if self._forgets:
            self._last = 0
        return self.prefill([token])[0]


def table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (VOCAB, VOCAB, VOCAB)).astype(np.float32)


def windows(count: int, length: int, seed: int = 0) -> list[Window]:
    generator = np.random.default_rng(seed)
    judged = np.array([False] + [True] * (length - 1))
    return [
        Window(generator.integers(0, VOCAB, length), judged, "en", np.full(length, number)) for number in range(count)
    ]


def probabilities(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64))
    return e / e.sum(-1, keepdims=True)


def test_scores_are_those_of_the_tables() -> None:
    p, q, text = table(1), table(2), windows(7, 30)
    scores = judge.score(judge.Reference(TableRuntime(p)), [TableRuntime(q)], text)
    p_all, q_all = probabilities(p), probabilities(q)
    kl, nll, agreement = [], [], []
    for window in text:
        before = 0
        for token, following in zip(window.tokens, window.tokens[1:], strict=False):
            a, b = p_all[before, token], q_all[before, token]
            kl.append(sum(x * np.log(x / y) for x, y in zip(a, b, strict=True)))
            nll.append(-np.log(b[following]))
            agreement.append(float(max(range(VOCAB), key=a.__getitem__) == max(range(VOCAB), key=b.__getitem__)))
            before = token
    np.testing.assert_allclose(scores.kl, kl, atol=1e-12)
    np.testing.assert_allclose(scores.nll, nll, atol=1e-12)
    np.testing.assert_array_equal(scores.agreement, agreement)
    np.testing.assert_array_equal(scores.cluster, np.repeat(np.arange(7), 29))

    figures = {m.name: m for m in judge.accuracy(scores, "npu")}
    reference = figures["reference_perplexity"].value
    assert figures["perplexity"].value == pytest.approx(np.exp(np.mean(nll)))
    assert figures["perplexity_ratio"].value == pytest.approx(figures["perplexity"].value / reference)
    assert figures["mean_kl"].value == pytest.approx(np.mean(kl))
    assert figures["p99_kl"].value == pytest.approx(np.quantile(kl, 0.99))
    assert figures["tokens_judged"].value == 7 * 29


def test_the_same_model_scores_nothing() -> None:
    p = table(1)
    figures = {
        m.name: m
        for m in judge.accuracy(judge.score(judge.Reference(TableRuntime(p)), [TableRuntime(p)], windows(4, 20)), "cpu")
    }
    assert figures["mean_kl"].value == 0
    assert figures["perplexity_ratio"].value == 1
    assert figures["top1_agreement"].value == 1


def test_two_runtimes_share_the_work_and_the_order_stays() -> None:
    p, q, text = table(1), table(2), windows(9, 12)
    reference = judge.Reference(TableRuntime(p))
    alone = judge.score(reference, [TableRuntime(q)], text)
    shared = judge.score(reference, [TableRuntime(q), TableRuntime(q)], text)
    np.testing.assert_array_equal(alone.kl, shared.kl)
    np.testing.assert_array_equal(alone.cluster, shared.cluster)


def test_more_runtimes_than_windows() -> None:
    p, q = table(1), table(2)
    runtimes = [TableRuntime(q) for _ in range(3)]
    assert len(judge.score(judge.Reference(TableRuntime(p)), runtimes, windows(2, 10)).kl) == 18


def test_tokens_that_begin_a_text_are_not_judged() -> None:
    p, q = table(1), table(2)
    (window,) = windows(1, 10)
    judged = window.judged.copy()
    judged[[4, 7]] = False
    scores = judge.score(judge.Reference(TableRuntime(p)), [TableRuntime(q)], [replace(window, judged=judged)])
    whole = judge.score(judge.Reference(TableRuntime(p)), [TableRuntime(q)], [window])
    np.testing.assert_array_equal(scores.kl, np.delete(whole.kl, [3, 6]))


def test_an_artifact_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(TargetError, match="answers"):
        judge.score(judge.Reference(TableRuntime(table(1))), [TableRuntime(table(2)[..., :4])], windows(2, 10))


def test_prefill_then_decode_equals_one_prefill() -> None:
    tokens = windows(1, 20)[0].tokens.tolist()
    kl, largest = judge.prefill_decode(TableRuntime(table(1)), tokens, 5, "cpu")
    assert (kl.value, largest.value, kl.n) == (0, 0, 5)


def test_a_decode_that_forgets_the_cache_is_seen() -> None:
    tokens = windows(1, 20)[0].tokens.tolist()
    kl, largest = judge.prefill_decode(TableRuntime(table(1), forgets=True), tokens, 5, "cpu")
    assert kl.value > 0.1
    assert largest.value > 1


def test_a_token_belongs_to_its_document_not_to_its_window() -> None:
    """A long document over several windows, short ones that share one: the error is that of documents."""
    p, q = table(1), table(2)
    numbers = [[0] * 20, [0] * 20, [0] * 8 + [1] * 12, [2] * 10 + [3] * 10]
    text = [replace(w, documents=np.array(n)) for w, n in zip(windows(4, 20), numbers, strict=True)]
    scores = judge.score(judge.Reference(TableRuntime(p)), [TableRuntime(q)], text)
    np.testing.assert_array_equal(scores.cluster, np.concatenate([n[1:] for n in numbers]))
    figures = {m.name: m for m in judge.accuracy(scores, "cpu")}
    assert figures["documents_judged"].value == 4
    assert figures["mean_kl"].error == metrics.mean(scores.kl, scores.cluster).error
    sums = judge.document_sums(scores, dict.fromkeys(range(4), "en"))
    assert sums.tokens == (45, 12, 9, 10)
    assert sums.kl == pytest.approx([scores.kl[scores.cluster == i].sum() for i in range(4)])


def test_domains_are_judged_apart_and_documents_add_up() -> None:
    p, q, text = table(1), table(2), windows(6, 20)
    domains = dict(enumerate(["en", "zh"] * 3))
    scores = judge.score(judge.Reference(TableRuntime(p)), [TableRuntime(q)], text)
    figures = {m.name: m for m in judge.accuracy(scores, "cpu", domains)}
    for first, domain in enumerate(("en", "zh")):
        alone = judge.score(judge.Reference(TableRuntime(p)), [TableRuntime(q)], text[first::2])
        for m in judge.accuracy(alone, "cpu"):
            if m.name not in ("p99_kl", "max_kl"):
                named = figures[f"{m.name}@{domain}"]
                assert (named.value, named.n) == (pytest.approx(m.value), m.n)
                assert named.error == pytest.approx(m.error)
    assert figures["max_kl"].value == scores.kl.max()
    assert not any(
        "@" in m.name for m in judge.accuracy(scores, "cpu", dict.fromkeys(range(6), "en"))
    )  # one domain: nothing twice

    sums = judge.document_sums(scores, domains)
    assert sums.domain == tuple(domains.values())
    assert sums.tokens == (19,) * 6
    assert sum(sums.kl) / sum(sums.tokens) == pytest.approx(figures["mean_kl"].value)
    ratio = np.exp((sum(sums.nll) - sum(sums.reference_nll)) / sum(sums.tokens))
    assert ratio == pytest.approx(figures["perplexity_ratio"].value)
    assert sum(sums.top1) / sum(sums.tokens) == pytest.approx(figures["top1_agreement"].value)
    assert sum(sums.top5) / sum(sums.tokens) == pytest.approx(figures["top5_agreement"].value)


def test_first_divergence_is_where_two_free_answers_part() -> None:
    p, q = table(1), table(1)
    q[:, 3] = table(5)[:, 3]  # other answers behind token 3 only
    prompts = [[0, 1], [2, 2], [4, 1]]
    found = judge.first_divergence(judge.Reference(TableRuntime(p)), [TableRuntime(q)], prompts, 12, "cpu")
    at = []
    for prompt in prompts:
        answers = []
        for runtime in (TableRuntime(p), TableRuntime(q)):
            row, answer = runtime.logits(prompt)[-1], []
            for _ in range(12):
                answer.append(int(row.argmax()))
                row = runtime.decode(answer[-1])
            answers.append(answer)
        at.append(next((i for i in range(12) if answers[0][i] != answers[1][i]), 12))
    assert min(at) < 12
    assert found.value == pytest.approx(np.mean(at))
    assert found.error == pytest.approx(np.std(at, ddof=1) / np.sqrt(3))
    reference = judge.Reference(TableRuntime(p))
    for agreement in (0.0, 0.5, 0.9):  # beginnings first, the whole where they are the same: the same figure
        again = judge.first_divergence(reference, [TableRuntime(q)], prompts, 12, "cpu", agreement=agreement)
        assert again == found
    same = judge.first_divergence(judge.Reference(TableRuntime(p)), [TableRuntime(p)], prompts, 12, "cpu")
    assert (same.value, same.note) == (12, "3 of 3 answers the same for all 12 tokens, 0 apart at a tie")
