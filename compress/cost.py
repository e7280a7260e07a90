"""What quantizing will take on this machine: memory, disk, seconds. Estimates, from shapes alone.

Memory is the sum of what the engine holds at its three fullest moments: while the embedding is read; in the last stage
of a block (two copies of its weights; the Hessian of the widest layer, its factor, and the same turned round, or what
some of its rows are solved with); at the head. Seconds are those of the matrix products at the rate that this machine
shows, of the scale search and of GPTQ's loop over the columns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from bluelm.block import block_of
from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from calibration.walk import KEPT_BYTES, Split
from compress.layers import ROWS, searches
from compress.methods.descent import SYSTEM_BYTES
from compress.methods.refine import BATCH_TOKENS
from compress.recipe import HEAD, Recipe, Widths

FLOAT = 4
LIBRARIES = 0.45e9  # bytes: Python, torch, its thread pools and buffers, what the allocator holds back
SEARCH_SECONDS = 50e-9  # of the scale search a weight, on one core
COLUMN_SECONDS = 40e-6  # of GPTQ's loop a column of up to ROWS rows
TRAINING = 4  # products of one training step, in forward passes: forward, twice that backward, rounding
ATTENTION_SHARE = 1 / 3  # rate of attention's small products, to that of large ones
STREAM_BYTES_PER_SECOND = 1e9  # of activations written to a disk, and of what is done element by element


@dataclass(frozen=True)
class Cost:
    """What one rank takes.

    Attributes:
        memory: peak resident bytes.
        disk: bytes at most, beside the checkpoint: codes, activations kept for going on, and those that do not fit.
        seconds: of the whole run, alone on this machine.
        size: bytes of the finished folder's tensors.
        activations: bytes of the residual streams of the calibration set, which `memory` holds unless on disk.
        on_disk: whether activations lie in memory-mapped files.
    """

    memory: float
    disk: float
    seconds: float
    size: float
    activations: float
    on_disk: bool


def cost(checkpoint: Checkpoint, recipe: Recipe, *, on_disk: bool, ranks: int = 1, rate: float | None = None) -> Cost:
    """What quantizing will take.

    Args:
        on_disk: see `engine.quantize`.
        rate: float32 operations a second of a large matrix product. Default: measured now.
    """
    shape = _Shape(checkpoint.config, recipe, ranks)
    kept = shape.streams + max(shape.mixed, shape.gated if on_disk else 0)
    size = finished_size(checkpoint.config, recipe)
    states = 2 * shape.streams  # the new state is written before the old one goes
    return Cost(
        memory=LIBRARIES + max(_embedding(checkpoint, shape, on_disk), shape.block(on_disk), shape.head(on_disk)),
        disk=size + states + (kept if on_disk else 0),
        seconds=_seconds(shape, on_disk, rate or matmul_rate()),
        size=size,
        activations=shape.streams,
        on_disk=on_disk,
    )


def finished_size(config: ModelConfig, recipe: Recipe) -> float:
    """Bytes of codes, scales and zero points of all weights."""
    total = 0.0
    for index in range(config.num_layers):
        for name, linear in block_of(config).linears.items():
            total += _stored(linear.rows, linear.columns, recipe.widths(f"model.layers.{index}.{name}"))
    total += _stored(config.vocab_size, config.hidden_size, Widths(recipe.embed_bits, -1, True))
    if not config.shares_table:
        total += _stored(config.vocab_size, config.hidden_size, recipe.widths(HEAD))
    return total


def matmul_rate() -> float:
    """float32 operations a second of a large matrix product on this machine, whatever else runs on it now."""
    a = torch.ones(1024, 1024)
    seconds: list[float] = []
    for _ in range(4):  # the first one warms up
        begin = time.process_time()
        torch.mm(a, a)
        seconds.append((time.process_time() - begin) / torch.get_num_threads())
    return 2 * 1024**3 / min(seconds[1:])


class _Shape:
    """Sizes in bytes and elements of one rank's share."""

    def __init__(self, config: ModelConfig, recipe: Recipe, ranks: int) -> None:
        self.config, self.recipe, self.ranks = config, recipe, ranks
        self.branches, self.stages = block_of(config).branches, block_of(config).stages
        self.linears = {name: (linear.rows, linear.columns) for name, linear in block_of(config).linears.items()}
        self.weights = sum(out * columns for out, columns in self.linears.values())  # of a block
        self.widest = max(columns for _, columns in self.linears.values())
        self.head_weights = 0 if config.shares_table else config.vocab_size * config.hidden_size
        reads = recipe.reads_text
        self.tokens = -(-recipe.samples // ranks) * recipe.length if reads else 0
        self.batch = Split(recipe.samples, recipe.length).step * recipe.length if reads else 0
        item = getattr(torch, recipe.activations).itemsize
        both = 2 if recipe.follows_float else 1
        self.streams = self.tokens * config.hidden_size * item * both
        kept = {mixes: [one.writer.columns for one in self.branches if one.mixes is mixes] for mixes in (True, False)}
        self.mixed_width, self.inner_width = (max(kept[mixes], default=0) for mixes in (True, False))
        self.mixed = self.tokens * self.mixed_width * item
        self.gated = self.tokens * self.inner_width * FLOAT

    def keeps_gated(self, on_disk: bool) -> bool:
        return on_disk or self.gated <= KEPT_BYTES

    def block(self, on_disk: bool) -> float:
        """In a block's fullest moment: while the moments of its widest stage are taken, or while that is solved."""
        if not self.recipe.reads_text:
            return FLOAT * 2 * self.weights
        square = FLOAT * self.widest**2
        widest = max(self.linears.values(), key=lambda shape: shape[1])
        cross = FLOAT * self.config.hidden_size * self.widest if self.recipe.follows_float else 0
        inner = FLOAT * self.batch * self.inner_width
        # float, AWQ's scaled float, quantized in float (the widest not yet), and codes
        weights = ((3 if self.recipe.scales_channels else 2) * FLOAT + 1) * self.weights
        weights -= (FLOAT + 1) * widest[0] * widest[1]
        kept = 0 if on_disk else self.streams + (self.gated if self.keeps_gated(False) else 0)
        rows = FLOAT * min(ROWS, widest[0]) * self.widest
        solving = cross + max(3 * square, 2 * square + max(6 * rows, 4 * rows + self.systems()))
        taking = 1.5 * square + 2 * cross + 4 * inner
        training = 6 * FLOAT * self.weights + self.streams / 2 if self.recipe.refine else 0
        attention = 0 if on_disk else self.mixed - (self.gated if self.keeps_gated(False) else 0)
        return weights + kept + max(solving, taking, training, attention)

    def systems(self) -> float:
        """What the scales of some rows are fitted with, behind a sweep: three copies of their systems."""
        if not (self.recipe.feeds_back and _sweeps(self.recipe)):
            return 0
        groups = 1 if self.recipe.group_size == -1 else self.widest // self.recipe.group_size
        return 3 * min(SYSTEM_BYTES, FLOAT * ROWS * groups**2)

    def head(self, on_disk: bool) -> float:
        """The head in float32, its codes, and the rows that are solved."""
        rows = 6 * FLOAT * ROWS * self.config.hidden_size
        kept = 0 if on_disk or not self.recipe.reads_text else self.streams
        return kept + (FLOAT + 1) * self.head_weights + 3 * FLOAT * self.config.hidden_size**2 + rows


def _embedding(checkpoint: Checkpoint, shape: _Shape, on_disk: bool) -> float:
    """The table as it is stored and in float32; or in float32 with its codes, joined from parts, and the streams."""
    table = checkpoint.config.vocab_size * checkpoint.config.hidden_size
    stored = max(getattr(torch, info.dtype, torch.float32).itemsize for info in checkpoint.tensors.values())
    return table * FLOAT + max(table * stored, 2 * table + (0 if on_disk else shape.streams))


def _seconds(shape: _Shape, on_disk: bool, rate: float) -> float:
    config, recipe = shape.config, shape.recipe
    threads = torch.get_num_threads()
    searched = shape.weights if searches(recipe, recipe.bits) else 0
    search = config.num_layers * searched / shape.ranks * SEARCH_SECONDS / threads
    tables = (shape.head_weights + config.vocab_size * config.hidden_size) * FLOAT * 10 / STREAM_BYTES_PER_SECOND
    if not recipe.reads_text:
        return search + tables + config.num_layers * shape.weights * FLOAT * 10 / STREAM_BYTES_PER_SECOND
    forward = 2 * shape.tokens * shape.weights
    attention = 2 * shape.tokens * recipe.length * shape.mixed_width / ATTENTION_SHARE
    passes = (2 if recipe.follows_float else 1) + (1 if recipe.scales_channels else 0)
    again = 0 if shape.keeps_gated(on_disk) else 4 * shape.tokens * config.hidden_size * shape.inner_width
    inputs = [shape.linears[stage.linears[0]][1] for stage in shape.stages]
    hessians = shape.tokens * sum(width**2 for width in inputs) * (2 if recipe.scales_channels else 1)
    cross = sum(2 * shape.tokens * one.writer.rows * one.writer.columns for one in shape.branches)
    solving = sum(_solving(out, columns, recipe) for out, columns in shape.linears.values()) / shape.ranks
    solving += sum(width**3 / 3 * threads for width in inputs)  # factorized on one thread
    training = recipe.refine * TRAINING * 2 * BATCH_TOKENS * shape.weights
    block = passes * (forward + attention) + again + hessians + solving + training
    block += cross if recipe.follows_float else 0
    head = (shape.tokens * config.hidden_size**2 if shape.head_weights else 0) + (
        _solving(config.vocab_size, config.hidden_size, recipe) / shape.ranks if shape.head_weights else 0
    )
    elements = passes * shape.tokens * (12 * config.hidden_size + 6 * shape.inner_width)
    moved = FLOAT * elements + 3 * shape.streams + (2 * shape.gated + 8 * shape.streams if on_disk else 0)
    columns = sum(-(-out // ROWS) * width for out, width in shape.linears.values()) / shape.ranks
    loops = config.num_layers * columns * (1 + _sweeps(recipe)) * COLUMN_SECONDS if recipe.feeds_back else 0
    other = config.num_layers * moved / STREAM_BYTES_PER_SECOND / threads
    return (config.num_layers * block + head) / rate + search + tables + loops + other


def _solving(out: int, columns: int, recipe: Recipe) -> float:
    """Operations of one weight: both losses, and the errors that GPTQ moves on."""
    # a sweep moves the codes, fits the scales, and weighs both
    return (5 + 4 * _sweeps(recipe) if recipe.feeds_back else 4) * out * columns**2


def _sweeps(recipe: Recipe) -> int:
    return recipe.sweeps if recipe.bits < 8 else 0


def _stored(rows: int, columns: int, widths: Widths) -> float:
    groups = 1 if widths.group_size == -1 else columns // widths.group_size
    zeros = 0 if widths.symmetric else widths.bits / 8
    return rows * (columns * widths.bits / 8 + groups * (2 + zeros))
