"""What quantizing will take on this machine: memory, disk, seconds. Estimates, from shapes alone.

Memory is the largest of three sums: while the embedding is read; in the last stage of a block (copies of its weights;
the Hessian of the widest layer, its factor, and the same reversed, or what some of its rows are solved with); at the
head. Seconds are those of the matrix products at the rate measured on this machine, of the scale search and of the
loops over columns. The recipe's method says what choosing codes takes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bluelm.block import block_of
from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from calibration.walk import KEPT_BYTES, Split
from compress.layers import ROWS, searches
from compress.methods.protocol import SolvingCost
from compress.methods.refine import BATCH_TOKENS
from compress.methods.rotate import quantized_config
from compress.recipe import HEAD, Recipe, Widths

FLOAT = 4
LIBRARIES = 0.45e9  # bytes: Python, torch, its thread pools and buffers, what the allocator holds back
SEARCH_SECONDS = 50e-9  # of the scale search a weight, on one core
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
    config = quantized_config(checkpoint.config, recipe)
    shape = _Shape(config, recipe, ranks)
    kept = shape.streams + max(shape.mixed, shape.gated if on_disk else 0)
    size = finished_size(config, recipe)
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
    """Bytes of codes, scales and zero points of all weights of a quantized checkpoint's config."""
    total = 0.0
    for index in range(config.num_layers):
        for name, linear in block_of(config).linears.items():
            total += _stored(linear.rows, linear.columns, recipe.widths(f"model.layers.{index}.{name}"))
    total += table_size(config, recipe)
    if not config.shares_table:
        total += _stored(config.vocab_size, config.hidden_size, recipe.widths(HEAD))
    return total


def table_size(config: ModelConfig, recipe: Recipe) -> float:
    """Bytes of the embedding table."""
    return _stored(config.vocab_size, config.hidden_size, Widths(recipe.embed_bits, -1, True))


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
    """Sizes of one rank's share: of tensors in bytes, else in elements."""

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

    def solving(self, out: int, columns: int) -> SolvingCost:
        """What the recipe's method takes for a linear [out, columns]."""
        recipe = self.recipe
        widths = Widths(recipe.bits, recipe.group_size, recipe.symmetric)
        return recipe.quantizer.cost(out, columns, widths, recipe.quantizer_options)

    def block(self, on_disk: bool) -> float:
        """Bytes in a block's fullest moment: while its widest stage's moments are taken, or while that is solved."""
        if not self.recipe.reads_text:
            return FLOAT * 2 * self.weights
        hessian_bytes = FLOAT * self.widest**2
        widest = max(self.linears.values(), key=lambda shape: shape[1])
        cross_bytes = FLOAT * self.config.hidden_size * self.widest if self.recipe.follows_float else 0
        gated_batch_bytes = FLOAT * self.batch * self.inner_width
        # float, folded float, quantized in float (the widest not yet), and codes
        copies = 3 if self.recipe.statistics.float_block else 2
        weight_bytes = (copies * FLOAT + 1) * self.weights - (FLOAT + 1) * widest[0] * widest[1]
        stream_bytes = 0 if on_disk else self.streams + (self.gated if self.keeps_gated(False) else 0)
        row_bytes = FLOAT * min(ROWS, widest[0]) * self.widest
        system_bytes = self.solving(*widest).system_bytes
        solving = cross_bytes + max(
            3 * hessian_bytes,  # with its factor, and that turned round
            2 * hessian_bytes + max(6 * row_bytes, 4 * row_bytes + system_bytes),
        )
        summing = 1.5 * hessian_bytes + 2 * cross_bytes + 4 * gated_batch_bytes
        training = 6 * FLOAT * self.weights + self.streams / 2 if self.recipe.refine else 0
        attention = 0 if on_disk else self.mixed - (self.gated if self.keeps_gated(False) else 0)
        return weight_bytes + stream_bytes + max(solving, summing, training, attention)

    def head(self, on_disk: bool) -> float:
        """Bytes of the head: in float32, its codes, and the rows that are solved."""
        hessian_bytes = FLOAT * self.config.hidden_size**2
        row_bytes = 6 * FLOAT * ROWS * self.config.hidden_size
        stream_bytes = 0 if on_disk or not self.recipe.reads_text else self.streams
        return stream_bytes + (FLOAT + 1) * self.head_weights + 3 * hessian_bytes + row_bytes


def _embedding(checkpoint: Checkpoint, shape: _Shape, on_disk: bool) -> float:
    """The table as it is stored and in float32; or in float32 with its codes, joined from parts, and the streams."""
    table = checkpoint.config.vocab_size * checkpoint.config.hidden_size
    stored = max(getattr(torch, info.dtype, torch.float32).itemsize for info in checkpoint.tensors.values())
    return table * FLOAT + max(table * stored, 2 * table + (0 if on_disk else shape.streams))


def _seconds(shape: _Shape, on_disk: bool, rate: float) -> float:
    config, recipe = shape.config, shape.recipe
    blocks, threads = config.num_layers, torch.get_num_threads()
    searched = shape.weights if searches(recipe, recipe.bits) else 0
    search_seconds = blocks * searched / shape.ranks * SEARCH_SECONDS / threads
    tables = shape.head_weights + config.vocab_size * config.hidden_size
    table_seconds = tables * FLOAT * 10 / STREAM_BYTES_PER_SECOND
    solved = [shape.solving(out, columns) for out, columns in shape.linears.values()]
    head = shape.solving(config.vocab_size, config.hidden_size) if shape.head_weights else SolvingCost()
    operations = blocks * sum(one.operations for one in solved) + head.operations
    solving_seconds = operations / shape.ranks / rate
    solving_seconds += blocks * sum(one.loop_seconds for one in solved) / shape.ranks
    seconds = search_seconds + table_seconds + solving_seconds
    if not recipe.reads_text:
        return seconds + blocks * shape.weights * FLOAT * 10 / STREAM_BYTES_PER_SECOND
    stages = [shape.linears[stage.linears[0]] for stage in shape.stages]
    factorizations = sum(shape.solving(*linear).factorization_operations for linear in stages)
    factorization_seconds = blocks * factorizations * threads / rate  # on one thread
    products = blocks * _walking(shape, stages, on_disk)
    products += shape.tokens * config.hidden_size**2 if shape.head_weights else 0  # the head's Hessian
    training_seconds = blocks * recipe.refine * TRAINING * 2 * BATCH_TOKENS * shape.weights / rate
    moved_bytes = FLOAT * _passes(recipe) * shape.tokens * (12 * config.hidden_size + 6 * shape.inner_width)
    moved_bytes += 3 * shape.streams + (2 * shape.gated + 8 * shape.streams if on_disk else 0)
    moving_seconds = blocks * moved_bytes / STREAM_BYTES_PER_SECOND / threads
    return seconds + factorization_seconds + products / rate + training_seconds + moving_seconds


def _passes(recipe: Recipe) -> int:
    """How often the calibration text goes through a block."""
    return 1 + int(recipe.follows_float) + int(recipe.statistics.float_block)


def _walking(shape: _Shape, stages: Sequence[tuple[int, int]], on_disk: bool) -> float:
    """Operations of the walk through one block: forward passes, Hessians, and what is summed for the float stream."""
    tokens = shape.tokens
    forward = 2 * tokens * shape.weights
    attention = 2 * tokens * shape.recipe.length * shape.mixed_width / ATTENTION_SHARE
    again = 0 if shape.keeps_gated(on_disk) else 4 * tokens * shape.config.hidden_size * shape.inner_width
    hessians = tokens * sum(columns**2 for _, columns in stages) * (2 if shape.recipe.statistics.float_block else 1)
    cross = sum(2 * tokens * one.writer.rows * one.writer.columns for one in shape.branches)
    walked = _passes(shape.recipe) * (forward + attention) + again + hessians
    return walked + (cross if shape.recipe.follows_float else 0)


def _stored(rows: int, columns: int, widths: Widths) -> float:
    groups = 1 if widths.group_size == -1 else columns // widths.group_size
    zeros = 0 if widths.symmetric else widths.bits / 8
    return rows * (columns * widths.bits / 8 + groups * (2 + zeros))
