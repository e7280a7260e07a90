"""Rules that every target shares, checked before any work."""

from __future__ import annotations

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from bluelm.rope import max_context
from compress.recipe import Recipe


def check_lengths(config: ModelConfig, context: int, chunk: int) -> None:
    """InputError unless 1 <= chunk <= context <= what the model was made for."""
    if not 1 <= chunk <= context:
        raise InputError(
            f"a prefill chunk of {chunk} tokens does not fit a context of {context}",
            fix="choose a chunk between 1 and the context",
        )
    longest = max_context(config)
    if context > longest or context < 2:
        raise InputError(
            f"a context of {context} tokens is outside what the model was made for",
            fix=f"choose a context from 2 to {longest}",
        )


def check_groups(config: ModelConfig, recipe: Recipe) -> None:
    """TargetError unless the groups divide the rows of every linear."""
    linears = block_of(config).linears.values()
    for linear in linears:
        if recipe.group_size != -1 and linear.columns % recipe.group_size:
            fits = [str(size) for size in (128, 64, 32) if all(one.columns % size == 0 for one in linears)]
            raise TargetError(
                f"groups of {recipe.group_size} do not divide the {linear.columns} inputs of {linear.weight}",
                fix=f"use --group-size {' or '.join([*fits, '-1'])}",
            )


def weight_bytes(config: ModelConfig, recipe: Recipe) -> tuple[float, float]:
    """Bytes of one block and of the head: codes, and a float32 scale a group."""
    group = config.hidden_size if recipe.group_size == -1 else recipe.group_size
    head = config.vocab_size * config.hidden_size
    return block_of(config).weights * (recipe.bits / 8 + 4 / group), head * recipe.head_bits / 8


def check_integer_kernels(runtime: str, recipe: Recipe) -> None:
    """TargetError unless the weights suit kernels of integer weights without zero points, groups for 4
    bits alone."""
    if not recipe.symmetric:
        raise TargetError(f"{runtime} has no zero points for weights", fix="use a symmetric recipe")
    for what, bits, size in (
        ("weights", recipe.bits, recipe.group_size),
        ("a head", recipe.head_bits, recipe.head_group_size),
    ):
        if bits == 8 and size != -1:
            fix = "use one scale a row (group size -1) for 8 bits, or 4 bits"
            raise TargetError(f"{runtime} cannot hold {what} of 8 bits in groups of {size}", fix=fix)
