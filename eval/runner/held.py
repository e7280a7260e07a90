"""Compares an artifact's standard runner with the checkpoint: tokens, chats, probabilities, end tokens.

What is right comes from the checkpoint's own tokenizer and template, and from its quantized weights in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from bluelm.text.tokenizer import Tokenizer
from eval.accuracy import metrics
from eval.accuracy.positions import Allowance
from eval.files.origin import origin
from eval.measurement import Measurement
from eval.runner.texts import HARD, chats, long_text
from eval.runner.twin import of_format
from export.artifacts.artifact import Artifact
from export.formats import StandardRunner, function
from targets.host.torch_runtime import TorchRuntime
from targets.runners.runner import Runner, fix_of, named, open_runner, runner_of, version_of
from targets.runtime import natural

PROMPTS, PREFILLED, DECODED = 6, 32, 6
SAME_SCORE = 0.05  # nats: two builds of the same kernels
LONG = 256  # tokens of one prompt, for what shows at no earlier position: a window
REFUSALS = "runner_refusals"
"""The figure without which nothing was judged in a runner."""


@dataclass(frozen=True)
class Expected:
    """What the checkpoint says.

    Attributes:
        config, tokenizer: the float checkpoint's.
        texts: a corpus. prompts: tokens of text, each of some length.
        weights: the artifact's own in float32; None where they are not at hand.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    texts: Sequence[str]
    prompts: Sequence[Sequence[int]]
    weights: TorchRuntime | None


def installed_version(artifact: Artifact) -> str | None:
    """Of the artifact's runner; None where it has none, or that is not here."""
    runner = artifact.record.runner
    return version_of(runner) if isinstance(runner, StandardRunner) else None


def not_judged(artifact: Artifact, figures: Iterable[Measurement]) -> list[str]:
    """A sentence where no runner judged the artifact, or one for what that cannot do; `figures` are the artifact's."""
    runner = artifact.record.runner
    if any(figure.name == REFUSALS for figure in figures):
        return left_out(runner) if isinstance(runner, StandardRunner) else []
    if isinstance(runner, StandardRunner):
        return [f"not judged in its runner, {runner.name}, which is not installed: {fix_of(runner)}"]
    return [f"not judged in a runner: {runner.reason}"]


def left_out(runner: StandardRunner) -> list[str]:
    """What a runner cannot do, and so is not held to."""
    found = [f"{runner.name} stands in for {runner.stands_in}"] if runner.stands_in else list[str]()
    if not runner.begins:
        found.append(f"texts were compared in {runner.name} without what begins them: {runner.begins.reason}")
    if not runner.continues:
        how = "closed, with an answer asked for" if runner.asks_always else "closed"
        found.append(
            f"an answer that is to be continued was compared in {runner.name} {how}: {runner.continues.reason}"
        )
    if runner.leaves_out is not None:
        found.append(f"where {runner.name} misreads it, a text was compared without that: {runner.misreads}")
    if not runner.probabilities:
        reason = runner.probabilities.reason
        found.append(f"probabilities are not {runner.name}'s but the runtime's on the same file: {reason}")
    if not runner.ends_at_once:
        found.append(f"an answer that ends at once goes on in {runner.name}: {runner.ends_at_once.reason}")
    return found


def figures(artifact: Artifact, expected: Expected, subject: str) -> list[Measurement]:
    """All figures of the runner; `by` names the program.

    Raises:
        InputError, UnavailableError: there is no runner, or it is not installed.
    """
    told = runner_of(artifact)
    found: list[Measurement] = []
    name = named(told)
    try:
        with open_runner(artifact) as runner:
            name = runner.name
            found += _figures(runner, told, artifact, expected)
    except TargetError as error:
        found = [Measurement(REFUSALS, 1, "", "measured", note=error.problem), *found]
    how = {"how": "emulated"} if told.stands_in else {}
    return [replace(figure, subject=subject, by=figure.by or name, **how) for figure in found]


def _figures(runner: Runner, told: StandardRunner, artifact: Artifact, expected: Expected) -> Iterator[Measurement]:
    texts = [*HARD, long_text(expected.texts), *expected.texts]
    tokens = _token_faults(runner, told, expected.tokenizer, texts)
    yield _faults("runner_token_mismatches", tokens, "texts", len(texts))
    yield from _chats(runner, told, expected.tokenizer)
    yield _faults("runner_end_faults", _end_faults(runner, expected), "tokens")
    yield from _probabilities(runner, told, artifact, expected)
    yield _faults(REFUSALS, [*_shape_faults(runner, artifact), *_answer_faults(runner, told, artifact, expected)], "")


def _shape_faults(runner: Runner, artifact: Artifact) -> Iterator[str]:
    if runner.context != artifact.context:
        yield f"it takes the model to be made for {runner.context} tokens, not {artifact.context}"
    if runner.vocab_size != artifact.model.vocab_size:
        yield f"it knows {runner.vocab_size} tokens, not {artifact.model.vocab_size}"


def _answer_faults(runner: Runner, told: StandardRunner, artifact: Artifact, expected: Expected) -> Iterator[str]:
    """What a program that tells no probabilities says otherwise than its file's; behind a short and a long text."""
    if told.probabilities or not expected.prompts:
        return
    room = artifact.context - 2 * DECODED  # what was cut out of a text may take more tokens as one of its own
    for pick in (min, max):
        text = expected.tokenizer.decode(pick(expected.prompts, key=len)[:room])
        (tokens,) = runner.tokens([text])
        try:
            runner.answer(tokens, DECODED)
            if told.scores:
                yield from _score_faults(runner, told, tokens)
        except (InputError, TargetError) as error:
            yield error.problem


def _score_faults(runner: Runner, told: StandardRunner, tokens: Sequence[int]) -> Iterator[str]:
    """Tokens of a text that it scores otherwise than its file's runtime, whose probabilities are the weights'."""
    for prefilled in range(len(tokens) - DECODED, 1, -1):  # behind some tokens a text cannot be cut
        try:
            scores = runner.scores(tokens, prefilled)
        except InputError:
            continue
        rows = runner.distributions(tokens, prefilled)
        for at, (score, row) in enumerate(zip(scores, rows, strict=False), prefilled):
            wanted = float(row[tokens[at]])
            if not abs(float(score) - wanted) <= SAME_SCORE:
                yield f"{told.name} scores token {at} of {len(tokens)} {score:.4g}, its file's runtime {wanted:.4g}"
        return
    yield f"{told.name} scores no part of a text"


def _token_faults(runner: Runner, told: StandardRunner, tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[str]:
    def wanted(text: str) -> list[int]:
        return tokenizer.encode(text, bos=bool(told.begins), marks=True)

    less: Callable[[str, Tokenizer], str] | None = None if told.leaves_out is None else function(told.leaves_out)
    for text, found in zip(texts, runner.tokens(texts), strict=True):
        if found == wanted(text):
            continue
        rest = text if less is None else less(text, tokenizer)
        if rest == text or runner.tokens([rest]) != [wanted(rest)]:
            yield f"{text[:30]!r}: {_apart(found, wanted(text))}"


def _chats(runner: Runner, told: StandardRunner, tokenizer: Tokenizer) -> list[Measurement]:
    """[] where the checkpoint has no template: then what the program takes instead is its own affair."""
    if tokenizer.template is None:
        return []
    faults = _chat_faults(runner, told, tokenizer)
    return [_faults("runner_chat_mismatches", faults, "chats", len([*chats(tokenizer)]))]


def _chat_faults(runner: Runner, told: StandardRunner, tokenizer: Tokenizer) -> Iterator[str]:
    for messages, tools in chats(tokenizer):
        goes_on = messages[-1].role == "assistant" and bool(told.continues)
        try:
            asks = True if told.asks_always else None
            wanted = tokenizer.chat(
                messages, tools=tools or None, continue_final_message=goes_on, add_generation_prompt=asks
            )
        except InputError:
            wanted = None  # the template refuses it, so the program must
        try:
            prompt = runner.chat([{"role": m.role, "content": m.content} for m in messages], tools)
        except InputError as error:
            if wanted is not None:
                yield f"{messages[-1].content[:20]!r}: {error.problem[:80]}"
            continue
        shown = f"{messages[-1].content[:20]!r}"
        if wanted is None:
            yield f"{shown}: it takes what the template refuses"
        elif list(prompt.tokens) != wanted:
            yield f"{shown}: {_apart(prompt.tokens, wanted)}, its text begins {prompt.text[:30]!r}"
        elif prompt.counted not in (None, len(wanted)):
            yield f"{shown}: {prompt.counted} tokens where its template's text has {len(wanted)}"


def _end_faults(runner: Runner, expected: Expected) -> Iterator[str]:
    """End tokens behind which it goes on, or another one behind which it stops."""
    own = expected.tokenizer.eos
    others = () if own is None or own in expected.config.eos_token_ids else (own,)
    ends: list[int] = [*expected.config.eos_token_ids, *others]
    prompt = list(expected.prompts[-1])[: runner.context // 2]  # with room for an answer
    for token in ends:
        if not runner.answer(prompt, 2, begin=token).ended:
            yield f"it goes on behind token {token}"
    if runner.answer(prompt, 1, begin=next(token for token in prompt[::-1] if token not in ends)).ended:
        yield "it stops at a token that ends nothing"
    if not ends:
        yield "no end token is known"


def _probabilities(runner: Runner, told: StandardRunner, artifact: Artifact, expected: Expected) -> list[Measurement]:
    """KL to the artifact's own weights, and how often the likeliest token is the same."""
    if expected.weights is None:
        return []
    costs: Callable[..., Allowance] = (
        partial(of_format, artifact) if told.allowance is None else function(told.allowance)
    )
    prompts = expected.prompts[: told.prompts]
    most = costs(expected.weights, prompts, DECODED + 1)
    kl: list[NDArray[np.float64]] = []
    same: list[NDArray[np.float64]] = []
    for tokens in prompts:
        prefilled = max(1, len(tokens) - DECODED)
        right = metrics.log_softmax(expected.weights.logits(tokens)[prefilled - 1 :])  # [decoded + 1, vocab]
        found = metrics.log_softmax(runner.distributions(tokens, prefilled))
        kl.append(metrics.kl_divergence(right, found))
        same.append(metrics.top1_agreement(right, found))
    prefill, decode = np.array([rows[0] for rows in kl]), np.concatenate([rows[1:] for rows in kl])
    every, n = np.concatenate(kl), sum(map(len, kl))
    excess = max(prefill.mean() / most.range, decode.mean() / most.range, every.max() / most.single)
    note = f"prefill {prefill.mean():.2g}, decode {decode.mean():.2g}, the largest {every.max():.2g}; "
    note += f"{most.range:.2g} and {most.single:.2g} may be"
    agreed = float(np.concatenate(same).mean())
    by = "" if told.probabilities else origin(artifact, natural(artifact.format)).by
    return [
        Measurement("runner_kl", float(every.mean()), "nats/token", "measured", n=n, note=note, by=by),
        Measurement("runner_kl_excess", float(excess), "", "measured", n=n, note=note, by=by),
        Measurement("runner_top1_agreement", agreed, "", "measured", n=n, by=by),
    ]


def _apart(found: Sequence[int], wanted: Sequence[int]) -> str:
    """Where two rows of tokens part."""
    pairs = zip(found, wanted, strict=False)
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))
    return f"{list(found[at : at + 3])} instead of {list(wanted[at : at + 3])} at token {at} of {len(wanted)}"


def _faults(name: str, faults: Iterable[str], unit: str, n: int | None = None) -> Measurement:
    found = list(faults)
    shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    return Measurement(name, len(found), unit, "measured", n=n, note=shown)
