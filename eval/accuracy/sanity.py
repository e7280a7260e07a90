"""Whether a checkpoint that came quantized predicts text at all.

Its artifacts are compared with its own codes, so codes that were misread on the way in would be misread on both sides,
and agree. One check does not depend on reading them right: a language model predicts text better than the frequencies
of single tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.heldout import Window
from eval.measurement import Measurement

GUESS = "reference_to_guess"


def reference_to_guess(nll: NDArray[np.float64], windows: Sequence[Window], rows: int, subject: str) -> Measurement:
    """The reference's perplexity over that of the better of two guesses; at 1 and above it knows nothing.

    Args:
        nll: nats [n] that the reference gives to the judged tokens.
        windows: of all the text that there is.
        rows: of the vocabulary.
    """
    tokens = np.concatenate([window.tokens[window.judged] for window in windows])
    guesses = {"uniform": float(rows), "unigram": unigram_perplexity(tokens, rows)}
    name = min(guesses, key=lambda guess: guesses[guess])
    found = float(np.exp(nll.mean()))
    note = f"perplexity {found:.4g} of the checkpoint as it was read, {guesses[name]:.4g} of a {name} guess"
    return Measurement(GUESS, found / guesses[name], "", "measured", None, len(nll), note, subject)


def unigram_perplexity(tokens: NDArray[np.int64], rows: int) -> float:
    """Of guessing each token by how often it comes among the others, with one added for each of `rows`.

    Each token is left out of its own count: a guess that has seen its own answer would look too good on short text.
    """
    counts = np.bincount(tokens, minlength=rows)[tokens]
    return float(np.exp(-np.log(counts / (len(tokens) - 1 + rows)).mean()))
