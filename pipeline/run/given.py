"""Checks before any work that a checkpoint that came quantized predicts text at all."""

from __future__ import annotations

import math

import numpy as np

from bluelm.checkpoint import Checkpoint, file_shapes
from bluelm.errors import InputError
from bluelm.system.progress import Progress
from eval.accuracy.judge import Reference
from eval.accuracy.metrics import nll_of_logits
from eval.accuracy.sanity import reference_to_guess
from eval.heldout import HeldOut
from targets.host.torch_runtime import TorchRuntime

WINDOWS = 2
LARGEST = 8 << 30  # bytes of the float32 model: running a larger one takes long, and judging asks it anyway


def check_foresees(checkpoint: Checkpoint, held_out: HeldOut, rows: int, progress: Progress) -> None:
    """Make sure that a checkpoint, as it was read, predicts text better than guessing; very large ones are not checked.

    Args:
        rows: of the vocabulary.

    Raises:
        InputError: it does not.
    """
    if 4 * sum(math.prod(shape) for shape in file_shapes(checkpoint.config).values()) > LARGEST:
        return
    windows = held_out.windows[:WINDOWS]
    reference = Reference(TorchRuntime(checkpoint, held_out.length))
    nats: list[np.ndarray] = []
    with progress.task("try the checkpoint", total=len(windows)) as task:
        for window in windows:
            at = np.flatnonzero(window.judged[1:])
            nats.append(nll_of_logits(reference.logits(window.tokens.tolist())[at], window.tokens[1:][at]))
            task.advance()
    found = reference_to_guess(np.concatenate(nats), held_out.windows, rows, "")
    if not found.value < 1:  # NaN as well
        raise InputError(
            f"the checkpoint predicts text no better than guessing ({found.note}): its codes are misread, or of no use",
            where=checkpoint.folder,
            fix="check its quantization settings and tokenizer, try --eval with text in its language, "
            "or give the float checkpoint",
        )
