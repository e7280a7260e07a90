"""Options that stand over a recipe: which they are, and their values as a recipe takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTHS = ("bits", "group_size", "head_bits", "embed_bits")  # one of a few numbers each
RECIPE = (
    "method", *WIDTHS, "size", "max_kl", "symmetric", "refine", "rotate", "samples", "length", "seed", "activations",
)  # fmt: skip


def recipe_values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe was given as options, by its keys.

    Args:
        parameters: of the command (`typer.Context.params`), whose options on the recipe have the names of its keys.
    """
    found = {key: parameters[key] for key in RECIPE if parameters.get(key) is not None}
    return found | {key: int(found[key]) for key in WIDTHS if found.get(key, "auto") != "auto"}


def number(text: str | None) -> int | None:
    """The value of an option that takes one of a few numbers."""
    return None if text is None else int(text)
