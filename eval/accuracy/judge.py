"""Runs an artifact and the float reference over the same windows and says how far apart they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from queue import SimpleQueue
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from bluelm.errors import TargetError
from bluelm.system.progress import Progress, Silent
from eval.accuracy import metrics
from eval.accuracy.compare import Continuation, Divergence, divergence, greedy
from eval.budget.confidence import Sample, sample_of
from eval.heldout import Window
from eval.measurement import JSON_NUMBERS, Measurement
from targets.runtime import Runtime

T = TypeVar("T")
Float = NDArray[np.float64]
Job = Callable[[Runtime], T]


@dataclass(frozen=True)
class TokenScores:
    """One number a judged token, float64 [n] each; `cluster` int64 [n] is the document that it stands in."""

    nll: Float
    reference_nll: Float
    kl: Float
    agreement: Float
    top5: Float
    cluster: NDArray[np.int64]

    @classmethod
    def join(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """The scores of several windows, one behind the other."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def of(self, clusters: Sequence[int]) -> TokenScores:
        """The tokens of some documents."""
        chosen = np.isin(self.cluster, clusters)
        return TokenScores(*(getattr(self, f.name)[chosen] for f in fields(self)))


@dataclass(frozen=True)
class DocumentSums:
    """What each document adds up to: enough to hold two runs on the same text against each other in pairs.

    Attributes:
        domain: of the document's text. tokens: how many were judged.
        nll, reference_nll, kl: nats. top1, top5: agreement with the float model, in tokens.
    """

    __pydantic_config__: ClassVar[Any] = JSON_NUMBERS
    domain: tuple[str, ...]
    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    reference_nll: tuple[float, ...]
    kl: tuple[float, ...]
    top1: tuple[float, ...]
    top5: tuple[float, ...]

    def __post_init__(self) -> None:
        """ValueError where a report's lists do not belong together."""
        if len({len(getattr(self, field.name)) for field in fields(self)}) > 1:
            raise ValueError("the sums by document are not all of the same number of documents")

    @property
    def samples(self) -> dict[str, Sample]:
        """What stands behind the errors: "" of all the text, else by domain."""
        by_domain = {name: [n for n, d in zip(self.tokens, self.domain, strict=True) if d == name]
                     for name in set(self.domain)}  # fmt: skip
        return {"": sample_of(self.tokens), **{name: sample_of(sizes) for name, sizes in by_domain.items()}}


class Reference:
    """The float model, shared by the threads that judge: one at a time runs it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._written: dict[tuple[tuple[int, ...], int], Continuation] = {}

    def logits(self, tokens: Sequence[int]) -> NDArray:
        """float32 [n, vocab]."""
        with self._lock:
            return self._runtime.logits(tokens)

    def greedy(self, prompt: Sequence[int], length: int) -> Continuation:
        """The text that the float model writes behind a prompt; each is written once."""
        asked = (tuple(prompt), length)
        with self._lock:
            if asked not in self._written:
                self._written[asked] = greedy(self._runtime, prompt, length)
            return self._written[asked]


def score_window(reference: NDArray, logits: NDArray, window: Window) -> TokenScores:
    """Scores of the tokens of one window that are judged.

    Args:
        reference: logits [n, vocab] of the float model.
        logits: [n, vocab] of the artifact. Row i answers what comes behind token i.
        window: the n tokens, of which those that count as targets are marked.
    """
    rows = np.flatnonzero(window.judged[1:])  # row i is judged if token i + 1 is a target
    few = metrics.FEW_ROWS
    parts = range(0, max(len(rows), 1), few)
    return TokenScores.join([_score_rows(reference, logits, window, rows[i : i + few]) for i in parts])


def _score_rows(reference: NDArray, logits: NDArray, window: Window, rows: NDArray[np.intp]) -> TokenScores:
    targets = window.tokens[1:][rows]
    candidate, reference = metrics.log_softmax(logits[rows]), metrics.log_softmax(reference[rows])
    return TokenScores(
        nll=metrics.negative_log_likelihood(candidate, targets),
        reference_nll=metrics.negative_log_likelihood(reference, targets),
        kl=metrics.kl_divergence(reference, candidate),
        agreement=metrics.top1_agreement(reference, candidate),
        top5=metrics.top_k_overlap(reference, candidate),
        cluster=window.documents[1:][rows],
    )


def score(
    reference: Reference,
    runtimes: Sequence[Runtime],
    windows: Sequence[Window],
    *,
    name: str = "judge",
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> TokenScores:
    """Scores of all windows; several runtimes of the same artifact share the work, a thread each.

    Args:
        stop: set from outside, it ends the work behind the windows under way.

    Raises:
        TargetError: the artifact answers with another number of rows or another vocabulary.
        CancelledError: it was stopped.
    """
    _, scores = score_beside((), reference, runtimes, windows, name=name, progress=progress, stop=stop)
    assert scores is not None
    return scores


def score_beside(
    jobs: Sequence[Job[T]],
    reference: Reference | None,
    runtimes: Sequence[Runtime],
    windows: Sequence[Window],
    *,
    name: str = "judge",
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> tuple[list[T], TokenScores | None]:
    """What other jobs give, which are begun first, and `score`; None without a reference or without windows."""
    with (progress or Silent()).task(name, total=len(jobs) + len(windows)) as task:

        def other(job: Job[T]) -> Job[T]:
            def work(runtime: Runtime) -> T:
                found = job(runtime)
                task.advance()
                return found

            return work

        def one(index: int, reference: Reference) -> Job[TokenScores]:
            def work(runtime: Runtime) -> TokenScores:
                window = windows[index]
                expected = reference.logits(window.tokens.tolist())
                logits = runtime.logits(window.tokens.tolist())
                _check_shape(runtime, logits, expected)
                task.advance(note=f"{len(window.tokens)} tokens a window")
                return score_window(expected, logits, window)

            return work

        scoring = [] if reference is None else [one(index, reference) for index in range(len(windows))]
        found = share(runtimes, [*(other(job) for job in jobs), *scoring], stop)
    scores = cast(list[TokenScores], found[len(jobs) :])
    return cast(list[T], found[: len(jobs)]), TokenScores.join(scores) if scores else None


def share(runtimes: Sequence[Runtime], jobs: Sequence[Job[T]], stop: threading.Event | None = None) -> list[T]:
    """What each job gives, each done by whichever of the runtimes is free.

    Raises:
        CancelledError: it was stopped.
    """
    stop = stop or threading.Event()
    free: SimpleQueue[Runtime] = SimpleQueue()
    for runtime in runtimes:
        free.put(runtime)

    def work(job: Job[T]) -> T:
        if stop.is_set():
            raise CancelledError
        runtime = free.get()
        try:
            return job(runtime)
        finally:
            free.put(runtime)

    with ThreadPoolExecutor(len(runtimes)) as pool:
        try:
            futures = [pool.submit(work, job) for job in jobs]
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            raise


def accuracy(scores: TokenScores, subject: str, domains: Mapping[int, str] | None = None) -> list[Measurement]:
    """The figures of one artifact against the reference, each with its clustered standard error.

    Args:
        domains: of each document. Where they differ, the means come once more for each, as `<name>@<domain>`.
    """
    found = _means(scores, subject)
    found += [
        Measurement(name, e.value, "nats/token", "measured", e.error, e.n, subject=subject)
        for name, e in (
            ("p99_kl", metrics.quantile(scores.kl, scores.cluster, 0.99)),
            ("max_kl", metrics.maximum(scores.kl, scores.cluster)),
        )
    ]
    present = {i: domains[i] for i in np.unique(scores.cluster).tolist()} if domains else {}
    names = sorted(set(present.values()))
    for name in names if len(names) > 1 else ():
        part = scores.of([i for i, domain in present.items() if domain == name])
        found += [replace(m, name=f"{m.name}@{name}") for m in _means(part, subject)]
    return found


def _means(scores: TokenScores, subject: str) -> list[Measurement]:
    figures = [
        ("perplexity", metrics.exp_mean(scores.nll, scores.cluster), ""),
        ("reference_perplexity", metrics.exp_mean(scores.reference_nll, scores.cluster), ""),
        ("perplexity_ratio", metrics.exp_mean(scores.nll - scores.reference_nll, scores.cluster), ""),
        ("mean_kl", metrics.mean(scores.kl, scores.cluster), "nats/token"),
        ("top1_agreement", metrics.mean(scores.agreement, scores.cluster), ""),
        ("top5_agreement", metrics.mean(scores.top5, scores.cluster), ""),
    ]
    documents = len(np.unique(scores.cluster))
    return [
        Measurement("tokens_judged", len(scores.kl), "tokens", "measured", subject=subject),
        Measurement("documents_judged", documents, "documents", "measured", subject=subject),
        *(Measurement(name, e.value, unit, "measured", e.error, e.n, subject=subject) for name, e, unit in figures),
    ]


def document_sums(scores: TokenScores, domains: Mapping[int, str]) -> DocumentSums:
    """The scores added up by document."""
    documents, index = np.unique(scores.cluster, return_inverse=True)
    columns = (scores.nll, scores.reference_nll, scores.kl, scores.agreement, scores.top5)
    return DocumentSums(
        tuple(domains[i] for i in documents.tolist()),
        tuple(np.bincount(index).tolist()),
        *(tuple(np.bincount(index, weights=column).tolist()) for column in columns),
    )


def first_divergence(
    reference: Reference,
    runtimes: Sequence[Runtime],
    prompts: Sequence[Sequence[int]],
    length: int,
    subject: str,
    *,
    agreement: float = 1.0,
    progress: Progress | None = None,
) -> Measurement:
    """How many tokens of a greedy answer come before the first that the artifact would choose otherwise.

    The mean over the prompts; an answer of `length` tokens that is the same to its end counts as `length`.

    Args:
        agreement: share of tokens for which both choose the same. Where it is small, answers part early, and the float
            model writes but their beginnings: most of a large model's time goes into them.
    """
    likely = (
        length if agreement >= 1 else 4 + round(2 * agreement / (1 - agreement))
    )  # twice the mean of a geometric one

    def one(index: int, prompt: Sequence[int]) -> Job[Divergence]:
        def parts(runtime: Runtime) -> Divergence:
            found = divergence(runtime, index, prompt, *reference.greedy(prompt, min(likely, length)))
            if found.at is None and likely < length:
                found = divergence(runtime, index, prompt, *reference.greedy(prompt, length))
            task.advance()
            return found

        return parts

    with (progress or Silent()).task(f"compare answers of the {subject.upper()} artifact", total=len(prompts)) as task:
        found = share(runtimes, [one(i, prompt) for i, prompt in enumerate(prompts)])
    at = np.array([length if d.at is None else d.at for d in found], dtype=np.float64)
    whole = sum(d.at is None for d in found)
    estimate = metrics.mean(at, np.arange(len(at)))
    note = (
        f"{whole} of {len(found)} answers the same for all {length} tokens, {sum(d.tie for d in found)} apart at a tie"
    )
    return Measurement("first_divergence", estimate.value, "tokens", "measured", estimate.error, len(at), note, subject)


def prefill_decode(runtime: Runtime, tokens: Sequence[int], steps: int, subject: str) -> list[Measurement]:
    """Whether token-by-token decoding answers as one long prefill does.

    The last `steps` of the tokens are decoded one by one behind a prefill of the others, and compared
    with the same rows of one prefill of them all. A decode graph that forgets or misplaces the cache
    shows here, though perplexity by prefill alone would not see it.
    """
    whole = runtime.logits(tokens)[-steps:]  # [steps, vocab]
    runtime.reset()
    runtime.prefill(tokens[:-steps])
    decoded = np.stack([runtime.decode(token) for token in tokens[-steps:]])  # [steps, vocab]
    kl = metrics.kl_of_logits(whole, decoded)
    largest = float(np.abs(whole.astype(np.float64) - decoded).max())
    note = f"{len(tokens) - steps} tokens of prefill, then {steps} of decode"
    return [
        Measurement("prefill_decode_kl", float(kl.mean()), "nats/token", "measured", None, steps, note, subject),
        Measurement("prefill_decode_max_difference", largest, "logits", "measured", None, steps, note, subject),
    ]


def _check_shape(runtime: Runtime, logits: NDArray, reference: NDArray) -> None:
    if logits.shape != reference.shape:
        raise TargetError(
            f"the artifact answers {logits.shape} logits where the float model answers {reference.shape}",
            where=runtime.name,
            fix="export the artifact from this checkpoint again",
        )
