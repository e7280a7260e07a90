"""Quantizing while being killed: `python -m tests.support.faults.survival MODEL OUT SEED`.

Every attempt is a forked process that sends itself SIGKILL at a random one of its function calls; the next attempt
finds what it left. Prints how often it was killed and how many blocks were begun in all, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bluelm.checkpoint import Checkpoint
from calibration.samples import Samples, load_samples
from compress import engine
from compress.recipe import Recipe

MOST_KILLS = 12


def main(model: Path, out: Path, seed: int) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    checkpoint = Checkpoint.open(model)
    recipe = Recipe.load("w4-g32", samples=16, length=32)
    samples = load_samples(None, checkpoint.tokenizer(), 16, 32, 0)
    journal = Path(tempfile.mkdtemp()) / "begun"
    journal.touch()
    note_begun_blocks(journal)

    def attempt(out: Path, calls: float) -> int:
        return forked(lambda: quantize_within(calls, checkpoint, samples, recipe, out))

    whole = journal.with_name("whole")
    calls = forked_count(lambda: quantize_within(float("inf"), checkpoint, samples, recipe, whole), journal.parent)
    journal.write_text("")
    draw = random.Random(seed)
    kills = 0
    while attempt(out, draw.randrange(calls // 2) if kills < MOST_KILLS else float("inf")) != 0:
        kills += 1
    print(json.dumps({"kills": kills, "begun": len(journal.read_text().split())}))


def quantize_within(calls: float, checkpoint: Checkpoint, samples: Samples, recipe: Recipe, out: Path) -> int:
    """Quantize, or die at the call after so many; how many calls there were."""
    made = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        if event in ("call", "c_call"):
            made += 1
            if made > calls:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    engine.quantize(checkpoint, samples, recipe, out)
    sys.setprofile(None)
    return made


def forked(work: Callable[[], object]) -> int:
    """What the process that did the work ended with: 0, or the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("an attempt failed by itself")
    return status


def forked_count(work: Callable[[], int], folder: Path) -> int:
    """What the work returned in a forked process."""
    said = folder / "count"
    forked(lambda: said.write_text(str(work())))
    return int(said.read_text())


def note_begun_blocks(journal: Path) -> None:
    """Let every block that is quantized leave a line."""
    original = engine._Run._solve_block

    def noted(self: Any, index: int, *rest: Any) -> Any:
        with journal.open("a") as file:
            file.write(f"{index}\n")
        return original(self, index, *rest)

    engine._Run._solve_block = noted  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
