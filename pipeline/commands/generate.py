"""The command `generate`: a finished artifact continues a prompt; the text is streamed."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bluelm.errors import InputError
from bluelm.text.tokenizer import NO_TEMPLATE, Message, Tokenizer
from eval.files.origin import origin
from export.artifacts.artifact import MANIFEST, Artifact
from export.formats import StandardRunner
from pipeline.run.binding import open_run
from pipeline.terminal import Answer, say
from targets.host.generation import ends, generate, until
from targets.runners.runner import open_runner
from targets.runtime import Place, open_runtime


def answer(
    run: Path,
    prompt: str,
    *,
    on: Place,
    chat: bool,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Print the artifact's answer as it comes.

    Raises:
        InputError: not a finished run, no artifact for `on`, an empty prompt or one longer than the context.
    """
    folder = artifact_folder(run, on)
    artifact = Artifact.open(folder)
    tokenizer = Tokenizer.from_folder(folder)
    if not prompt.strip():
        raise InputError("the prompt is empty", fix='give one: --prompt "…"')
    if chat and tokenizer.template is None:
        say(f"({NO_TEMPLATE})", error=True)
        chat = False
    if chat:
        tokens = tokenizer.chat([Message("user", prompt)], now=datetime.now())
    else:
        tokens = tokenizer.encode(prompt, bos=True)
    if len(tokens) >= artifact.context:
        raise InputError(
            f"the prompt is {len(tokens)} tokens long, the artifact's context holds {artifact.context}",
            fix="shorten the prompt, or export with a larger --context",
        )
    generator = np.random.default_rng(seed)
    text, shown = tokenizer.stream(continues=not chat), Answer()
    with open_runtime(folder, on=on) as runtime:
        new = generate(runtime, tokens, max_tokens, lambda logits: pick(logits, temperature, generator))
        held = len(tokens)
        for token in until(new, ends(tokenizer, artifact)):
            shown.add(text.push(token))
            held += 1
    shown.add(text.flush())
    shown.end()
    ran = origin(artifact, on)
    if ran.how == "emulated":
        say(f"(emulated by {ran.by})", error=True)
    if held == artifact.context:
        say(f"(the context of {artifact.context} tokens is full)", error=True)


def answer_through(
    run: Path, prompt: str, name: str, *, chat: bool, max_tokens: int, temperature: float, seed: int
) -> None:
    """Print what the artifact answers in its standard runner, with the tokenizer and template that this reads.

    Raises:
        InputError: no finished run, none of its artifacts is opened by that runner, an empty prompt or one longer than
            the context. UnavailableError: the runner is not installed.
    """
    artifact = Artifact.open(_opened_by(run, name))
    if not prompt.strip():
        raise InputError("the prompt is empty", fix='give one: --prompt "…"')
    if chat and Tokenizer.from_folder(artifact.folder).template is None:
        say(f"({NO_TEMPLATE})", error=True)
        chat = False
    with open_runner(artifact, name) as runner:
        if chat:
            tokens = list(runner.chat([{"role": "user", "content": prompt}]).tokens)
        else:
            (tokens,) = runner.tokens([prompt])
        room = runner.room(len(tokens))
        if room < 1:
            raise InputError(
                f"the prompt is {len(tokens)} tokens long, which leaves no room in the artifact's context of "
                f"{runner.context}",
                fix="shorten the prompt, or export with a larger --context",
            )
        found = runner.answer(tokens, min(max_tokens, room), seed=seed, temperature=temperature)
        shown = Answer()
        shown.add(found.text)
        shown.end()
        full = not found.ended and len(found.tokens) == room
        told = f"(the context of {runner.context} tokens is full; {runner.name})" if full else f"({runner.name})"
        say(told, error=True)


def _opened_by(run: Path, name: str) -> Path:
    """Folder of the run's artifact that the runner opens; else of the one for CPUs, which says why not."""
    if not (run / MANIFEST).exists():
        for built in open_run(run).artifacts.values():
            runner = Artifact.open(run / built.folder).record.runner
            if isinstance(runner, StandardRunner) and runner.name == name:
                return run / built.folder
    return artifact_folder(run, "cpu")


def artifact_folder(run: Path, on: Place) -> Path:
    """Folder of the run's artifact that runs there; an artifact's own folder as it is.

    Raises:
        InputError: not a finished run, or it made no such artifact.
    """
    if (run / MANIFEST).exists():
        return run
    artifacts = open_run(run).artifacts.values()
    for built in artifacts:
        if built.on == ("interpreter" if on in ("gpu", "ane") else on):  # Core ML's, on a Mac
            return run / built.folder
    places = " or ".join(f"--on {built.on}" for built in artifacts)
    raise InputError(f"this run has no artifact that runs on {on}", where=run, fix=f"use {places}")


def pick(logits: NDArray, temperature: float, generator: np.random.Generator) -> int:
    """The likeliest token, or a draw from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # close to 0 all but the likeliest go to minus infinity
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return int(generator.choice(len(weights), p=weights / weights.sum()))
