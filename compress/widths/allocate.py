"""Mixed precision: a width for every linear that minimises loss within a size, or size within a loss.

The losses of the linears add up (each is small, and errors of different linears are about uncorrelated), and so do
their bytes. Choosing one width a linear is then a knapsack with one item of every class, solved exactly by dynamic
programming over bytes (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, section 11.5). Bytes are counted in
the largest unit that divides all differences; where that makes too long a table, sizes are rounded up to a coarser
one, so that what is promised still fits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bluelm.block import block_of
from bluelm.checkpoint import model_shapes
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.system.progress import Progress
from bluelm.weights import Weights
from compress.recipe import HEAD, Recipe, Widths
from compress.widths.sensitivity import Sensitivity, measure

LONGEST = 2**16  # entries of the table
TOKENS, LENGTH = 2048, 256  # tokens that sensitivities are measured on, and in a window
STREAM_BYTES = 2**31  # of activations, while they are measured
WIDTHS = tuple((bits, size) for bits in (4, 8) for size in (32, 64, 128, -1))


@dataclass(frozen=True)
class Allowed:
    """What there is to choose from: for the linears of the blocks, and for lm_head."""

    blocks: tuple[Widths, ...]
    head: tuple[Widths, ...]

    @staticmethod
    def all(recipe: Recipe) -> Allowed:
        """Every width."""
        widths = tuple(Widths(bits, size, recipe.symmetric) for bits, size in WIDTHS)
        return Allowed(widths, widths)


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        widths: of every linear by full name.
        size: bytes of the quantized checkpoint's weights, embedding and norms too.
        kl: estimated nats a token: the sum over linears, as if all were rounded to nearest. GPTQ loses less.
    """

    widths: Mapping[str, Widths]
    size: int
    kl: float


@dataclass(frozen=True)
class Chosen:
    """A recipe with a width for every linear, and how it came about."""

    recipe: Recipe
    allocation: Allocation
    sensitivities: Mapping[str, Sensitivity]

    def table(self) -> list[dict[str, Any]]:
        """A row a linear, plain values: the KL of rounding it alone, measured at one width, scaled to the chosen."""
        rows: list[dict[str, Any]] = []
        for name, width in self.allocation.widths.items():
            found = self.sensitivities[name]
            first = found.measured
            rows.append(
                {
                    "name": name,
                    "bits": width.bits,
                    "group_size": width.group_size,
                    "bytes": linear_bytes(found.shape, width),
                    "kl": float(f"{found.kl[width]:.4g}"),
                    "measured": f"{first.bits} bits, groups of {first.group_size}",
                    "kl_measured": float(f"{found.kl[first]:.4g}"),
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """Plain values for the report."""
        return {
            "bytes": self.allocation.size,
            "kl_estimated": float(f"{self.allocation.kl:.4g}"),
            "estimate": "the sum over linears of the KL of rounding each alone; GPTQ loses less",
            "linears": self.table(),
        }

    @property
    def summary(self) -> str:
        """One line: how many linears have which width."""
        counts = Counter((width.bits, width.group_size) for width in self.allocation.widths.values())
        parts = [
            f"{count} linears at {bits} bits, {'one scale a row' if size == -1 else f'groups of {size}'}"
            for (bits, size), count in sorted(counts.items())
        ]
        kl = f"KL about {self.allocation.kl:.2g} nats a token if rounded to nearest (an estimate; gptq loses less)"
        return f"{'; '.join(parts)}: {self.allocation.size / 1e6:.2f} MB of weights, {kl}"


def linear_bytes(shape: tuple[int, int], width: Widths) -> int:
    """Bytes of a quantized weight as it is stored: packed codes, float16 scales, packed zero points."""
    rows, columns = shape
    groups = 1 if width.group_size == -1 else columns // width.group_size
    zeros = 0 if width.symmetric else rows * -(-groups * width.bits // 8)
    return rows * -(-columns * width.bits // 8) + rows * groups * 2 + zeros


def fixed_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of what has no choice: the embedding table, norms and biases."""
    table = linear_bytes((config.vocab_size, config.hidden_size), Widths(recipe.embed_bits, -1, True))
    vectors = config.num_layers * block_of(config).vector_size + config.hidden_size
    return table + 4 * vectors


def uniform_bytes(sensitivities: Mapping[str, Sensitivity], config: ModelConfig, recipe: Recipe) -> int:
    """Bytes with the recipe's own widths everywhere."""
    return fixed_bytes(config, recipe) + sum(
        linear_bytes(found.shape, recipe.widths(name)) for name, found in sensitivities.items()
    )


def allocate(sensitivities: Mapping[str, Sensitivity], config: ModelConfig, recipe: Recipe) -> Allocation:
    """Choose within `recipe.size` bytes or `recipe.max_kl`; with neither, within the size of the recipe's own widths.

    Raises:
        InputError: no choice keeps within it.
    """
    names = list(sensitivities)
    sizes = [{w: linear_bytes(sensitivities[n].shape, w) for w in sensitivities[n].kl} for n in names]
    losses = [sensitivities[n].kl for n in names]
    fixed, least = fixed_bytes(config, recipe), sum(min(size.values()) for size in sizes)
    most = sum(max(size.values()) for size in sizes)
    room = most
    if recipe.max_kl is None:
        limit = recipe.size if recipe.size is not None else uniform_bytes(sensitivities, config, recipe)
        room = min(limit - fixed, most)
        _check_limit(limit, fixed + least)
    widths = knapsack(sizes, losses, room, recipe.max_kl)
    if widths is None:
        lowest = sum(min(loss.values()) for loss in losses)
        raise InputError(
            f"no choice of widths keeps the estimated KL within {recipe.max_kl:g}: 8 bits everywhere lose {lowest:.2g}",
            fix=f"give --max-kl {lowest * 1.1:.1g} or more",
        )
    chosen = dict(zip(names, widths, strict=True))
    size = fixed + sum(size[width] for size, width in zip(sizes, widths, strict=True))
    return Allocation(chosen, size, sum(loss[width] for loss, width in zip(losses, widths, strict=True)))


def check_room(config: ModelConfig, recipe: Recipe, allowed: Allowed) -> None:
    """Whether the recipe's size can be kept: that takes the shapes of the linears alone.

    Raises:
        InputError: the smallest widths that are allowed take more.
    """
    if recipe.size is None:
        return
    least = fixed_bytes(config, recipe)
    for name, shape in model_shapes(config).items():
        head = name == f"{HEAD}.weight"
        if (head and not config.shares_table) or name.endswith("_proj.weight"):
            rows, columns = shape
            fitting = [
                linear_bytes((rows, columns), width)
                for width in (allowed.head if head else allowed.blocks)
                if width.group_size == -1 or columns % width.group_size == 0
            ]
            least += min(fitting, default=0)
    _check_limit(recipe.size, least)


def _check_limit(limit: int, least: int) -> None:
    if limit < least:
        raise InputError(
            f"{limit:,} bytes are too few: at the smallest widths this model takes {least:,}",
            fix=f"give --size {math.ceil(least / 1e5) / 10:.1f}MB or more, or --embed-bits 4",
        )


def knapsack(
    sizes: Sequence[Mapping[Widths, int]],
    losses: Sequence[Mapping[Widths, float]],
    room: int,
    max_loss: float | None = None,
) -> list[Widths] | None:
    """One width of every class: the least loss within `room`, or the least size with a loss of `max_loss` at most.

    Exact, unless the table would be longer than `LONGEST`: then sizes are rounded up. None if nothing fits.
    """
    floors = [min(size.values()) for size in sizes]
    spare = room - sum(floors)
    if spare < 0:
        return None
    extras = [
        {width: bytes_ - floor for width, bytes_ in size.items()} for size, floor in zip(sizes, floors, strict=True)
    ]
    unit = math.gcd(*(extra for class_ in extras for extra in class_.values())) or 1
    unit = max(unit, -(-spare // LONGEST))
    length = spare // unit + 1
    best = np.zeros(length)  # least loss of the classes so far within so many units
    picks: list[np.ndarray] = []
    for extra, loss in zip(extras, losses, strict=True):
        options = list(extra)
        table = np.full((len(options), length), np.inf)
        for row, width in enumerate(options):
            units = -(-extra[width] // unit)
            if units < length:
                table[row, units:] = best[: length - units] + loss[width]
        picks.append(table.argmin(0))
        best = table.min(0)
    at = length - 1
    if max_loss is not None:
        fits = np.flatnonzero(best <= max_loss)
        if not len(fits):
            return None
        at = int(fits[0])
    chosen: list[Widths] = []
    for extra, pick in zip(reversed(extras), reversed(picks), strict=True):
        width = list(extra)[pick[at]]
        chosen.append(width)
        at -= -(-extra[width] // unit)
    return chosen[::-1]


def resolved(recipe: Recipe, allocation: Allocation) -> Recipe:
    """The recipe with the chosen widths in place of `auto`: the most frequent as its own, the others by name."""
    widths = [(width.bits, width.group_size) for name, width in allocation.widths.items() if name != HEAD]
    bits, group_size = max(sorted(set(widths)), key=widths.count)
    values = recipe.model_dump() | {
        "auto": False, "size": None, "max_kl": None, "bits": bits, "group_size": group_size, "layers": {},
    }  # fmt: skip
    if HEAD in allocation.widths:
        head = allocation.widths[HEAD]
        values |= {"head_bits": head.bits, "head_group_size": head.group_size}
    values["layers"] = {
        name: {"bits": width.bits, "group_size": width.group_size}
        for name, width in allocation.widths.items()
        if name != HEAD and (width.bits, width.group_size) != (bits, group_size)
    }
    return Recipe.make(values)


def choose(
    weights: Weights, tokens: Tensor, recipe: Recipe, allowed: Allowed | None = None, progress: Progress | None = None
) -> Chosen:
    """Measure, allocate, and put the result in place of `auto`.

    Args:
        weights: the float model, rotated already if the recipe says so.
        tokens: int64 [n, T], calibration windows; as many are used as `sample` keeps.
        allowed: what the target can hold. Default: everything.

    Raises:
        InputError: no choice keeps within the recipe's size or KL; the target leaves no width.
    """
    allowed = allowed or Allowed.all(recipe)
    if not allowed.blocks or not allowed.head:
        raise InputError("the target supports neither 4 nor 8 bits with this recipe", fix="choose --symmetric")
    measured = measure(weights, sample(tokens, weights.config), allowed.blocks, allowed.head, progress)
    allocation = allocate(measured, weights.config, recipe)
    return Chosen(resolved(recipe, allocation), allocation, measured)


def sample(tokens: Tensor, config: ModelConfig) -> Tensor:
    """The windows that sensitivities are measured on, int64 [n, T]: few enough for a stream a linear in memory."""
    streams = config.num_layers * 7 + 1
    count = min(TOKENS, STREAM_BYTES // (streams * config.hidden_size * 4))
    length = max(2, min(LENGTH, tokens.shape[1], count))
    return tokens[: max(1, count // length), :length]
