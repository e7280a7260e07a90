"""Options that are laid over a recipe: named as its keys in every command that has them, numbers as numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from compress.recipe import Recipe
from pipeline.cli import export
from pipeline.commands.quantize import quantize
from pipeline.options.recipe import RECIPE, recipe_values


@pytest.mark.parametrize("command", [export, quantize])
def test_every_key_is_an_option_of_the_command(command: Callable[..., None]) -> None:
    assert set(RECIPE) <= set(inspect.signature(command).parameters) and set(RECIPE) <= set(Recipe.keys())


def test_only_what_was_given_is_laid_over_the_recipe() -> None:
    given = {"bits": "4", "group_size": "-1", "head_bits": None, "rotate": False, "seed": 0, "model": "there"}
    assert recipe_values(given) == {"bits": 4, "group_size": -1, "rotate": False, "seed": 0}
    assert recipe_values({"bits": "auto", "embed_bits": "8"}) == {"bits": "auto", "embed_bits": 8}
    assert Recipe.load("w4-g32", **recipe_values(given)).group_size == -1
