"""Whether a recipe fits a model: its group sizes, the linears that it names, tables that are shared."""

from __future__ import annotations

import difflib

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from compress.methods.rotate import quantized_config
from compress.recipe import HEAD, Recipe


def check(config: ModelConfig, recipe: Recipe) -> None:
    """Make sure that a recipe fits a model.

    Raises:
        InputError: a group size does not divide a layer's width; a table that serves as embedding and head is
            to have two widths.
    """
    if recipe.auto:
        raise InputError(
            "the widths of this recipe are to be chosen yet", fix="choose them with compress.widths.allocate"
        )
    config = quantized_config(config, recipe)
    columns_of = {name: linear.columns for name, linear in block_of(config).linears.items()}
    groups = {name: (recipe.group_size, columns) for name, columns in columns_of.items()}
    groups[HEAD] = (recipe.head_group_size, config.hidden_size)
    groups |= {name: (recipe.layers[name].group_size, width) for name, width in _named_widths(config, recipe).items()}
    for name, (size, columns) in groups.items():
        if size != -1 and columns % size:
            fitting = [str(fit) for fit in (128, 64, 32) if not any(width % fit for width in columns_of.values())]
            raise InputError(
                f"group size {size} does not divide the {columns} columns of {name}",
                fix=f"choose {', '.join([*fitting, '-1 (one scale a row)'])}",
            )
    if config.shares_table and (recipe.head_bits, recipe.head_group_size) != (recipe.embed_bits, -1):
        raise InputError(
            "head and embedding of this model are one table, but the recipe gives them two widths",
            fix="set head_bits equal to embed_bits, and head_group_size to -1",
        )


def _named_widths(config: ModelConfig, recipe: Recipe) -> dict[str, int]:
    """Columns of every linear that the recipe names.

    Raises:
        InputError: the model has none of that name.
    """
    known = {
        f"model.layers.{index}.{name}": linear.columns
        for index in range(config.num_layers)
        for name, linear in block_of(config).linears.items()
    } | ({} if config.shares_table else {HEAD: config.hidden_size})
    for name in recipe.layers:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "name a linear, e.g. model.layers.0.self_attn.q_proj"
            raise InputError(f"recipe: the model has no linear {name}", fix=fix)
    return {name: known[name] for name in recipe.layers}
