"""Compares any two runtimes of one model: distributions, greedy tokens, and block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from bluelm.errors import InputError
from bluelm.model import DecoderBlock
from bluelm.rope import inverse_frequencies, rope_rows
from bluelm.weights import Weights
from eval.accuracy import metrics
from eval.accuracy.metrics import Estimate
from eval.accuracy.twins import Twin
from export.formats import record
from targets.runtime import Runtime

EXACT = ("float", "dequantized")  # checkpoints, which torch runs in float32
TIE = 1e-2  # top two logits closer than this: either may come first
TWIN_KL = 1e-4  # of an artifact to its debug build: the same codes on the same kernels, compiled once more
BESIDE_TWIN, FLOOR = 2.0, 1e-5  # a block may err so many times as its twin does, and as much as float32 does
OUTLIER = 2.5  # against other weights than its own, a block may err this many times as much as the middle one

Steps = Callable[[Sequence[int]], NDArray[np.float32]]
"""Tokens -> the residual stream before the first block and behind each, float32 [layers + 1, n, hidden]."""
Continuation = tuple[list[int], list[float]]
"""Tokens of a greedy text, and by how much each was preferred to the next best, in logits."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: in tables.
        kind: its format, or one of `EXACT`.
        runtime: gives logits.
        steps: gives the stream block by block; None where it was not asked for.
        twin: logits of what `steps` runs, where that is a build of its own.
        weights: the weights in float32 where the subject is a checkpoint.
        digest: of the quantized checkpoint that it holds; empty for a float one.
        arithmetic: the twin that rounds as it does; None where nobody knows how it rounds, or it does not.
        stand_in: what runs in place of the phone's runtime; empty where that itself runs.
    """

    name: str
    kind: str
    runtime: Runtime
    steps: Steps | None = None
    weights: Weights | None = None
    digest: str = ""
    twin: Steps | None = None
    stand_in: str = ""
    arithmetic: Twin | None = None


@dataclass(frozen=True)
class Divergence:
    """Where a runtime would first choose another token than the reference, following its text greedily.

    Attributes:
        at: position behind the prompt; None if all `length` tokens agree.
        margin: by how much the reference prefers its token to the next best one there, in logits.
    """

    prompt: int
    length: int
    at: int | None = None
    expected: int | None = None
    found: int | None = None
    margin: float | None = None

    @property
    def tie(self) -> bool:
        """Whether the reference hardly preferred its own token."""
        return self.margin is not None and self.margin < TIE


@dataclass(frozen=True)
class BlockErrors:
    """Relative L2 error of what each block adds to the stream, and the largest that is expected of it.

    Attributes:
        local: each block was given the subject's own stream; else errors of earlier blocks are in it too.
        twin_kl: mean KL of the subject to the build of it that shows its blocks.
    """

    errors: tuple[float, ...]
    expected: tuple[float, ...]
    local: bool
    twin_kl: float = 0.0

    @property
    def same_twin(self) -> bool:
        """Whether the build that shows its blocks answers as the subject does; else it cannot speak for it."""
        return self.twin_kl < TWIN_KL

    @property
    def first_outside(self) -> int | None:
        """The first block beyond the expected range."""
        pairs = enumerate(zip(self.errors, self.expected, strict=True))
        return next((i for i, (error, limit) in pairs if not error <= limit), None)

    @property
    def excess(self) -> float:
        """The largest error as a share of what is expected there."""
        shares = [error / limit for error, limit in zip(self.errors, self.expected, strict=True)]
        return max(shares, key=lambda share: share if np.isfinite(share) else np.inf)


@dataclass(frozen=True)
class Comparison:
    """What `compare` says of one subject."""

    name: str
    kl: Estimate
    top1: Estimate
    largest_kl: float
    divergences: tuple[Divergence, ...]
    blocks: BlockErrors | None = None


def compare(
    reference: Side,
    subjects: Sequence[Side],
    windows: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    length: int = 64,
    block_window: Sequence[int] | None = None,
) -> list[Comparison]:
    """Hold each subject against the reference.

    Args:
        windows: token windows for KL and top-1.
        prompts: each continued greedily by the reference for `length` tokens.
        block_window: tokens for the errors of blocks; None for none.
    """
    _check_same_model(reference, subjects)
    expected = [reference.runtime.logits(window) for window in windows]
    texts = [greedy(reference.runtime, prompt, length) for prompt in prompts]
    found = []
    for subject in subjects:
        candidate = [subject.runtime.logits(window) for window in windows]
        kl = [metrics.kl_of_logits(e, c) for e, c in zip(expected, candidate, strict=True)]
        same = [metrics.top1_agreement(e, c) for e, c in zip(expected, candidate, strict=True)]
        cluster = np.concatenate([np.full(len(k), i) for i, k in enumerate(kl)])
        flat = np.concatenate(kl)
        found.append(
            Comparison(
                name=subject.name,
                kl=metrics.mean(flat, cluster),
                top1=metrics.mean(np.concatenate(same), cluster),
                largest_kl=float(flat.max()),
                divergences=tuple(
                    divergence(subject.runtime, i, prompt, *text)
                    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
                ),
                blocks=None if block_window is None else block_errors(reference, subject, block_window),
            )
        )
    return found


def block_errors(reference: Side, subject: Side, tokens: Sequence[int]) -> BlockErrors:
    """Error of what each block adds, ||(a_i - a_i-1) - (r_i - r_i-1)|| / ||r_i - r_i-1||.

    Where the reference's weights are at hand, its block i is given the subject's own stream a_i-1, so that
    each block answers for itself alone; else r is the reference's own stream.

    Raises:
        InputError: a subject that cannot show its blocks.
    """
    if subject.steps is None:
        raise InputError(f"{subject.name} cannot show the output of its blocks")
    stream = subject.steps(tokens)  # [layers + 1, n, hidden]
    same, kinds = reference.digest == subject.digest, (subject.kind, reference.kind)
    if reference.weights is not None:
        found = local_errors(reference.weights, stream, reference.runtime.context, kinds, same, subject.arithmetic)
    elif reference.steps is not None:
        errors = _relative(stream, np.diff(reference.steps(tokens).astype(np.float64), axis=0))
        found = BlockErrors(tuple(errors.tolist()), _expected(_known(kinds, len(errors)), same, errors), False)
    else:
        raise InputError(f"{reference.name} cannot show the output of its blocks")
    if subject.twin is None:
        return found
    own, shown = (f(tokens) for f in (subject.runtime.logits, subject.twin))
    return replace(found, twin_kl=float(metrics.kl_of_logits(own, shown).mean()))


def local_errors(
    weights: Weights,
    stream: NDArray[np.float32],
    context: int,
    kinds: tuple[str, str],
    same: bool,
    twin: Twin | None = None,
) -> BlockErrors:
    """`block_errors` of a stream that was seen already, each block against the same block of `weights`.

    Args:
        stream: float32 [layers + 1, n, hidden], from position 0.
        kinds: formats, or `EXACT`. same: `weights` are the very ones that the stream was made with.
        twin: that rounds as the stream's runtime does; None: what is known of its kind must do.
    """
    errors = _relative(stream, _added_by(weights, stream, context))
    known = _known(kinds, len(errors))
    if twin is not None:
        known = np.maximum(known, _beside(twin, weights, stream, context))
    return BlockErrors(tuple(errors.tolist()), _expected(known, same, errors), True)


def _beside(twin: Twin, weights: Weights, stream: NDArray[np.float32], context: int) -> NDArray[np.float64]:
    """The largest error that is expected of each block, by what its twin errs on the same input."""
    found: list[float] = []
    for layer in range(weights.config.num_layers):
        x = torch.from_numpy(stream[layer : layer + 1])
        plain, rounded = twin.block(weights, layer, x, context)
        error = float((rounded - plain).double().norm() / (plain - x).double().norm())
        found.append(BESIDE_TWIN * error + FLOOR)
    return np.array(found)


def _known(kinds: tuple[str, str], layers: int) -> NDArray[np.float64]:
    """What their kinds of arithmetic cost on the demo model (`Record.block_error`)."""
    return np.full(layers, sum(0.0 if kind in EXACT else record(kind).block_error for kind in kinds))


def _expected(known: NDArray[np.float64], same: bool, errors: NDArray[np.float64]) -> tuple[float, ...]:
    """The largest error that is expected of each block: what arithmetic costs; against other weights than its own
    several times what the middle block errs."""
    return tuple((known if same else np.maximum(known, OUTLIER * np.median(errors))).tolist())


def _relative(stream: NDArray[np.float32], added: NDArray[np.float64]) -> NDArray[np.float64]:
    """Error of what each block adds, by the size of what it should add: [layers]."""
    apart = np.diff(stream.astype(np.float64), axis=0) - added  # [layers, n, hidden]
    return np.linalg.norm(apart, axis=(1, 2)) / np.linalg.norm(added, axis=(1, 2))


def weights_steps(weights: Weights, context: int) -> Steps:
    """The stream of the float decoder, block by block: one block's weights in memory at a time."""

    def steps(tokens: Sequence[int]) -> NDArray[np.float32]:
        stream = [weights.embedding()[list(tokens)].unsqueeze(0)]
        for layer in range(weights.config.num_layers):
            stream.append(_block_output(weights, layer, stream[-1], context))
        return torch.cat(stream).numpy()

    return steps


def _added_by(weights: Weights, stream: NDArray[np.float32], context: int) -> NDArray[np.float64]:
    """What the reference's blocks add to the subject's stream, float64 [layers, n, hidden]."""
    rows = [torch.from_numpy(stream[i : i + 1]) for i in range(weights.config.num_layers)]
    outputs = [_block_output(weights, i, x, context) - x for i, x in enumerate(rows)]
    return torch.cat(outputs).double().numpy()


@torch.no_grad()
def _block_output(weights: Weights, layer: int, x: torch.Tensor, context: int) -> torch.Tensor:
    """Block `layer` on x [1, n, hidden] from position 0."""
    frequencies = inverse_frequencies(weights.config, context)
    cos, sin = rope_rows(frequencies, 0, x.shape[1])
    return DecoderBlock.from_weights(weights.config, weights.block(layer))(x, cos, sin)


def greedy(runtime: Runtime, prompt: Sequence[int], length: int) -> Continuation:
    """The most likely tokens one after another, and by how much each was preferred to the next best."""
    runtime.reset()
    row = runtime.prefill(prompt)[-1]
    tokens, margins = [], []
    for step in range(length):
        best, second = np.sort(row)[-1:-3:-1]
        tokens.append(int(row.argmax()))
        margins.append(float(best - second))
        if step + 1 < length:
            row = runtime.decode(tokens[-1])
    return tokens, margins


def divergence(
    runtime: Runtime, prompt_index: int, prompt: Sequence[int], tokens: list[int], margins: list[float]
) -> Divergence:
    """One prefill over prompt and continuation: up to the first difference, what decoding would choose."""
    rows = runtime.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]  # [length, vocab]
    chosen = rows.argmax(axis=-1)
    apart = np.flatnonzero(chosen != np.array(tokens))
    if not len(apart):
        return Divergence(prompt_index, len(tokens))
    at = int(apart[0])
    return Divergence(prompt_index, len(tokens), at, tokens[at], int(chosen[at]), margins[at])


def _check_same_model(reference: Side, subjects: Sequence[Side]) -> None:
    for subject in subjects:
        if subject.runtime.vocab_size != reference.runtime.vocab_size:
            raise InputError(
                f"{subject.name} has {subject.runtime.vocab_size} tokens, {reference.name} "
                f"{reference.runtime.vocab_size}: they are not of the same model"
            )
