"""`--bits auto`: chooses a width for every linear before quantizing, and keeps them as a recipe file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from bluelm.system.files import write_text
from bluelm.system.progress import Progress
from compress.methods.rotate import as_quantized
from compress.recipe import Recipe, Widths
from compress.widths.allocate import WIDTHS, Allowed, Chosen, check_room, choose
from targets.target import Target

RECIPE, TABLE = "recipe.yaml", "widths.json"


def choose_widths(
    checkpoint: Checkpoint, tokens: Tensor, recipe: Recipe, allowed: Allowed | None, progress: Progress
) -> Chosen:
    """The recipe with widths in place of `auto`; tokens: int64 [n, T], calibration windows."""
    return choose(as_quantized(checkpoint, recipe), tokens, recipe, allowed, progress)


def save(chosen: Chosen, folder: Path) -> None:
    """Write the recipe, to be fed back with --recipe, and the table behind it."""
    write_text(folder / RECIPE, f"# {chosen.summary}\n{chosen.recipe.to_yaml()}")
    write_text(folder / TABLE, json.dumps(chosen.to_json(), indent=1) + "\n")


def check_size(target: Target, config: ModelConfig, recipe: Recipe, *, context: int, chunk: int) -> None:
    """Whether `--size` can be kept at all, before anything is measured.

    Raises:
        InputError: it cannot. TargetError: as `held_by`.
    """
    check_room(config, recipe, held_by(target, config, recipe, context=context, chunk=chunk))


def held_by(target: Target, config: ModelConfig, recipe: Recipe, *, context: int, chunk: int) -> Allowed:
    """The widths that a target can hold in the blocks and in the head.

    Raises:
        TargetError: there is none; the error is that of the recipe's own widths.
    """
    plain = recipe.own_widths()

    def fitting(changed: Callable[[int, int], dict[str, int]]) -> tuple[Widths, ...]:
        found: list[Widths] = []
        for bits, size in WIDTHS:
            try:
                target.check(config, plain.model_copy(update=changed(bits, size)), context=context, chunk=chunk)
            except (TargetError, InputError):
                continue
            found.append(Widths(bits, size, recipe.symmetric))
        return tuple(found)

    blocks = fitting(lambda bits, size: {"bits": bits, "group_size": size})
    if not blocks:
        target.check(config, plain, context=context, chunk=chunk)
    some = {"bits": blocks[0].bits, "group_size": blocks[0].group_size} if blocks else {}
    head = fitting(lambda bits, size: {**some, "head_bits": bits, "head_group_size": size})
    if not head:
        target.check(config, plain.model_copy(update=some), context=context, chunk=chunk)
    return Allowed(blocks, head)
