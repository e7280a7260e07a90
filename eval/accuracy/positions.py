"""Accuracy over the whole context: by position, in prefill and in decode.

One text fills the context. A runtime takes it in chunks, as prompts that end near the edge of a chunk, and one token at
a time from places spread over it; every answer is compared with the same row of one reference. Where the context is too
long for a runtime's share of time, its beginning and its end are taken, the end behind empty slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from eval.accuracy import metrics
from eval.measurement import Measurement
from targets.runtime import Runtime

ROWS = 1024  # most answers that are kept of a text: 0.4 GB at a vocabulary of 100,000
AT_ONCE = 512  # tokens of a text that are taken at once
RANGES = 8  # most ranges of positions that are told apart
FEW = 16  # answers that have a mean of their own
Span = tuple[int, int]
"""From a position to the one behind the last."""
Int = NDArray[np.int64]
Float = NDArray[np.float64]


@dataclass(frozen=True)
class Allowance:
    """The most that an artifact may lie apart, in nats a token.

    Attributes:
        range: mean KL to its own weights in float32 over a range of positions.
        single: of one answer to the same. decode: of one answer to what prefill gives there.
    """

    range: float
    single: float
    decode: float

    def __add__(self, other: Allowance) -> Allowance:
        return Allowance(self.range + other.range, self.single + other.single, self.decode + other.decode)

    def at_least(self, other: Allowance) -> Allowance:
        """The larger of each."""
        return Allowance(max(self.range, other.range), max(self.single, other.single), max(self.decode, other.decode))


class Seeking(Protocol):
    """A runtime that can stand behind slots that nothing fills."""

    def seek(self, position: int) -> None:
        """Forget all tokens; the next stands at `position`, and sees none before it."""
        ...


@dataclass(frozen=True)
class PositionPlan:
    """Which positions are taken how.

    Attributes:
        context, chunk: of the artifact.
        pieces: spans that are prefilled, each from its own beginning on, in chunks.
        prompts: spans that are prefilled once more, behind what the cache holds before them.
        decodes: spans that are decoded token by token.
        kept: positions whose answers are held against the reference.
    """

    context: int
    chunk: int
    pieces: tuple[Span, ...]
    prompts: tuple[Span, ...]
    decodes: tuple[Span, ...]
    kept: tuple[int, ...]

    def inside(self, piece: Span) -> list[tuple[Span, bool]]:
        """Prompts (False) and decodes (True) of a piece, the last first: the cache still holds what is before them."""
        spans = [(span, False) for span in self.prompts] + [(span, True) for span in self.decodes]
        held = [one for one in spans if piece[0] <= one[0][0] and one[0][1] <= piece[1]]
        return sorted(held, key=lambda one: (-one[0][0], one[1]))


def plan(context: int, chunk: int, tokens: int, decoded: int, *, seeks: bool, brief: bool = False) -> PositionPlan:
    """Positions for a runtime that is given time for `tokens` tokens of prefill and `decoded` of decode.

    Args:
        seeks: the runtime can stand behind empty slots; else the whole context is prefilled, however long.
        brief: only the most telling prompts.
    """
    half = max(chunk, tokens // 2 // chunk * chunk)
    whole = not seeks or context <= 2 * half
    pieces: tuple[Span, ...] = ((0, context),) if whole else ((0, half), (context - half, context))
    prompts = [
        (0, 2),
        (context - max(2, chunk // 2), context),  # a chunk that does not fit behind what is cached
        (chunk + 1, 2 * chunk + 1),  # a whole one that begins beside an edge
        (0, chunk - 1),
        (chunk - 1, 2 * chunk),  # one more than a chunk
        (chunk + 1, chunk + 3),
    ][: 3 if brief else None]
    held = sorted({s for s in prompts if 0 <= s[0] < s[1] and any(p[0] <= s[0] and s[1] <= p[1] for p in pieces)})
    decodes = _decodes(context, chunk, pieces, decoded)
    wanted = {i for span in (*held, *decodes) for i in range(*span)}
    inside = [i for piece in pieces for i in range(*piece)]
    kept = sorted(wanted | set(_spread(inside, max(ROWS - len(wanted), RANGES * FEW))))
    return PositionPlan(context, chunk, pieces, tuple(held), decodes, tuple(kept))


def _decodes(context: int, chunk: int, pieces: Sequence[Span], count: int) -> tuple[Span, ...]:
    """A third of the tokens one behind another to the end of the context, the others where steps differ and spread."""
    inside = {i for piece in pieces for i in range(*piece)}
    if len(inside) <= count:
        return tuple(pieces)
    taken = set(range(context - max(1, count // 3), context))
    for position in (0, chunk, chunk - 1, context // 2, 1, chunk + 1):
        if len(taken) < count and position in inside:
            taken.add(position)
    left, more = sorted(inside - taken), count - len(taken)
    return _spans(sorted(taken | {left[(2 * i + 1) * len(left) // (2 * more)] for i in range(more)}))


def _spread(positions: Sequence[int], count: int) -> list[int]:
    """So many of the positions, evenly, the first and the last among them."""
    index = np.linspace(0, len(positions) - 1, min(count, len(positions))).round().astype(int)
    return np.array(positions)[np.unique(index)].tolist()


def _spans(positions: Sequence[int]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for position in positions:
        if spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], position + 1)
        else:
            spans.append((position, position + 1))
    return tuple(spans)


@dataclass(frozen=True)
class Rows:
    """Answers at positions: int64 [n] in order, logits float32 [n, vocab]."""

    at: Int
    logits: NDArray[np.float32]

    def at_positions(self, at: Int) -> NDArray[np.float32]:
        """Logits [n, vocab] at some of the positions.

        Raises:
            KeyError: one is not there.
        """
        index = np.searchsorted(self.at, at)
        if (index >= len(self.at)).any() or (self.at[index] != at).any():
            raise KeyError("positions without an answer")
        return self.logits[index]


def reference(runtime: Runtime, text: Sequence[int], plans: Sequence[PositionPlan]) -> dict[tuple[Span, ...], Rows]:
    """What the artifacts are held against, by the pieces of their plans: at all positions that they keep."""
    wanted: dict[tuple[Span, ...], set[int]] = {}
    for one in plans:
        wanted.setdefault(one.pieces, set()).update(one.kept)
    found: dict[tuple[Span, ...], Rows] = {}
    for pieces, kept in wanted.items():
        at = np.array(sorted(kept), np.int64)
        rows = [row for piece in pieces for row in _prefilled(runtime, text, piece, AT_ONCE, at)]
        found[pieces] = Rows(at, np.concatenate([logits for _, logits in rows]))
    return found


def _prefilled(
    runtime: Runtime, text: Sequence[int], piece: Span, step: int, kept: Int
) -> Iterator[tuple[Int, NDArray[np.float32]]]:
    """Kept positions and their answers, step by step."""
    if piece[0] == 0:
        runtime.reset()
    else:
        cast(Seeking, runtime).seek(piece[0])
    for start in range(piece[0], piece[1], step):
        stop = min(start + step, piece[1])
        answers = runtime.prefill(text[start:stop])
        at = kept[(kept >= start) & (kept < stop)]
        yield at, answers[at - start]


@dataclass
class Costs:
    """KL of answers at positions, in nats: to the reference (where there is one) and, of decode, to prefill."""

    at: list[int] = field(default_factory=list[int])
    kl: list[float] = field(default_factory=list[float])
    to_prefill: list[float] = field(default_factory=list[float])
    difference: float = 0.0  # largest of a decoded logit to the prefilled one


@dataclass(frozen=True)
class Found:
    """What a plan found, each way apart."""

    plan: PositionPlan
    prefill: Costs
    prompts: Costs
    decode: Costs


def run(runtime: Runtime, text: Sequence[int], chosen: PositionPlan, expected: Rows | None) -> Found:
    """Take the text as the plan says.

    Args:
        text: tokens, as many as the context holds.
        expected: the reference's answers at all positions that are kept; None: decode is held against prefill alone.
    """
    found = Found(chosen, Costs(), Costs(), Costs())
    step = max(1, AT_ONCE // chosen.chunk) * chosen.chunk
    kept, decoded = np.array(chosen.kept, np.int64), {i for span in chosen.decodes for i in range(*span)}

    def add(costs: Costs, at: Int, logits: NDArray[np.float32]) -> None:
        costs.at += at.tolist()
        if expected is not None and len(at):
            costs.kl += metrics.kl_of_logits(expected.at_positions(at), logits).tolist()

    for piece in chosen.pieces:
        whole: dict[int, NDArray[np.float32]] = {}
        for at, logits in _prefilled(runtime, text, piece, step, kept):
            add(found.prefill, at, logits)
            whole |= {int(i): row for i, row in zip(at, logits, strict=True) if int(i) in decoded}
        for (start, stop), single in chosen.inside(piece):
            runtime.rewind(start)
            at = np.arange(start, stop)
            if not single:
                add(found.prompts, at, runtime.prefill(text[start:stop]))
                continue
            rows = np.stack([runtime.decode(text[i]) for i in range(start, stop)])
            add(found.decode, at, rows)
            _hold_to_prefill(found.decode, np.stack([whole[i] for i in range(start, stop)]), rows)
    return found


def _hold_to_prefill(costs: Costs, prefilled: NDArray[np.float32], decoded: NDArray[np.float32]) -> None:
    costs.to_prefill += metrics.kl_of_logits(prefilled, decoded).tolist()
    largest = float(np.abs(prefilled.astype(np.float64) - decoded).max())
    costs.difference = max(costs.difference, largest) if np.isfinite(largest) else largest


def figures(found: Found, most: Allowance | None, subject: str) -> list[Measurement]:
    """KL to the reference by range of positions, the worst range and answer against what the format may cost; decode
    against prefill; the share of positions that was judged each way.

    Args:
        most: what the artifact may cost; None where nobody knows.
    """
    ways = {"prefill": found.prefill, "prompts": found.prompts, "decode": found.decode}
    held = [*_decode_figures(found, subject), *_coverage(found, subject)]
    with_kl = {way: costs for way, costs in ways.items() if costs.kl}  # none where there is no reference
    ranges = [(way, *one) for way, costs in with_kl.items() for one in _ranges(costs.at, costs.kl, found.plan)]
    if ranges:
        way, (start, stop), mean, n = max(ranges, key=lambda one: _worst(one[2]))
        note = f"to its own weights in float32; worst in {way} of positions {start} to {stop - 1}"
        held.append(Measurement("runtime_kl", mean, "nats/token", "measured", None, n, note, subject))
        held += [
            Measurement(f"runtime_kl@{name} {a}-{b - 1}", value, "nats/token", "measured", n=count, subject=subject)
            for name, (a, b), value, count in ranges
        ]
    if most is None:
        return held
    decode = found.decode
    ranges += [("decode against prefill", *one) for one in _ranges(decode.at, decode.to_prefill, found.plan)]
    return [*held, _worst_range(ranges, most, subject), _worst_answer(found, ways, most, subject)]


def _worst_range(ranges: Sequence[tuple[str, Span, float, int]], most: Allowance, subject: str) -> Measurement:
    """The range of positions that lies furthest beyond what one may cost: of answers to the artifact's own weights, and
    of decoded ones to prefilled ones."""
    way, (start, stop), mean, n = max(ranges, key=lambda one: _worst(one[2]))
    note = f"{way} of positions {start} to {stop - 1}: {mean:.2g} nats a token of the {most.range:.2g} that is expected"
    return Measurement("runtime_kl_excess", mean / most.range, "", "measured", None, n, f"{note} at most", subject)


def worst(found: Found) -> Allowance:
    """What prefill cost: the worst range of positions and the worst answer, which stands for decode as well."""
    single = max(found.prefill.kl)
    return Allowance(
        max(mean for _, mean, _ in _ranges(found.prefill.at, found.prefill.kl, found.plan)), single, single
    )


def _worst_answer(found: Found, ways: Mapping[str, Costs], most: Allowance, subject: str) -> Measurement:
    """The one answer that lies furthest beyond what one may cost."""
    singles = [
        (way, at, kl, most.single) for way, costs in ways.items() for at, kl in zip(costs.at, costs.kl, strict=False)
    ]
    decode = found.decode
    singles += [
        ("decode against prefill", at, kl, most.decode) for at, kl in zip(decode.at, decode.to_prefill, strict=True)
    ]
    way, at, kl, bound = max(singles, key=lambda one: _worst(one[2]) / one[3])
    note = f"{way} at position {at}: {kl:.2g} nats of the {bound:.2g} that is expected at most"
    return Measurement("position_kl_excess", kl / bound, "", "measured", None, len(singles), note, subject)


def _worst(value: float) -> float:
    """NaN counts as the worst."""
    return value if np.isfinite(value) else np.inf


def _ranges(at: Sequence[int], kl: Sequence[float], chosen: PositionPlan) -> list[tuple[Span, float, int]]:
    """(range, mean KL, answers) where there are enough of them; one range of all where there are few."""
    positions, costs = np.array(at, np.int64), np.array(kl)
    width = max(FEW, -(-chosen.context // RANGES))
    found: list[tuple[Span, float, int]] = []
    for start in range(0, chosen.context, width):
        here = costs[(positions >= start) & (positions < start + width)]
        if len(here) >= FEW:
            found.append(((start, min(start + width, chosen.context)), float(here.mean()), len(here)))
    if not found and len(costs):
        found.append(((int(positions.min()), int(positions.max()) + 1), float(costs.mean()), len(costs)))
    return found


def _decode_figures(found: Found, subject: str) -> list[Measurement]:
    """Decode against the same rows of prefill: the worst range of positions."""
    decode = found.decode
    ranges = _ranges(decode.at, decode.to_prefill, found.plan)
    (start, stop), value, n = max(ranges, key=lambda one: _worst(one[1]))
    note = f"{len(decode.at)} positions decoded; worst from {start} to {stop - 1}"
    return [
        Measurement("prefill_decode_kl", value, "nats/token", "measured", None, n, note, subject),
        Measurement("prefill_decode_max_difference", decode.difference, "logits", "measured", None, n, note, subject),
    ]


def _coverage(found: Found, subject: str) -> list[Measurement]:
    """Shares of the context's positions, the last among them."""
    told = {
        "prefill": "all prefilled" if len(found.plan.pieces) == 1 else "its beginning and its end, behind empty slots",
        "decode": "beginning, edges of chunks, middle and spread, then one behind another to the end",
    }
    context = found.plan.context
    held: list[Measurement] = []
    for way, costs in (("prefill", found.prefill), ("decode", found.decode)):
        at = set(costs.at)
        note = f"{len(at)} of {context} positions up to {max(at)}: {told[way] if len(at) < context else 'all'}"
        share = len(at) / context
        held.append(Measurement(f"{way}_coverage", share, "", "measured", n=len(at), note=note, subject=subject))
    return held
