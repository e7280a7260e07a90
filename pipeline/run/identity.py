"""Which run a folder belongs to: its name, and the settings that it was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.system.files import write_text
from bluelm.system.reading import read_json
from compress.recipe import Recipe
from pipeline.run.stages import RECORDS

SETTINGS = "settings"  # no stage's record, so without their suffix
NAMED = ("method", "bits", "group_size", "symmetric")  # of a recipe: what a name says in words


def slug(recipe: Recipe) -> str:
    """A recipe in a folder's name, e.g. "gptq-w4-g32"."""
    groups = "row" if recipe.group_size == -1 else f"g{recipe.group_size}"
    method = recipe.method.replace("+", "-")
    if recipe.auto:
        return f"{method}-auto{'' if recipe.symmetric else '-asym'}"
    return f"{method}-w{recipe.bits}-{groups}{'' if recipe.symmetric else '-asym'}"


def unusual(recipe: Recipe, chosen: Mapping[str, Any]) -> str:
    """Six hex digits of what makes another artifact and that a name does not say in words; "" if all is as usual.

    Args:
        chosen: settings beside the recipe that are not the default ones.
    """
    told = {**_others(recipe), **chosen}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:6] if told else ""


def _others(recipe: Recipe) -> dict[str, Any]:
    """What a recipe's name does not say in words, where it is not as in the default one."""
    if recipe.given:
        return {}  # the checkpoint's own, which its name stands for
    of_method = Recipe.load("w4-g32", method=recipe.method).model_dump(mode="json")  # with its section of options
    usual = {**of_method, **Recipe.load("w4-g32").model_dump(mode="json")}
    values = recipe.model_dump(mode="json").items()
    return {key: value for key, value in values if key not in NAMED and value != usual.get(key)}


def check_settings(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """See that a folder belongs to a run of these settings, or to none.

    Raises:
        InputError: it was made with others, and may not be overwritten.
    """
    path = folder / RECORDS / SETTINGS
    if overwrite or not path.is_file():
        return
    try:
        before = read_json(path)
    except InputError:
        return  # the stages' own records decide
    now = json.loads(json.dumps(settings))
    if before.get("checkpoint") != now["checkpoint"] and before.get("model") == now["model"]:
        before["checkpoint"] = now["checkpoint"]  # trained on in its place
    keys = sorted(key for key in now if before.get(key) != now[key])
    if "checkpoint" not in keys:
        keys = [key for key in keys if key != "model"]  # the same weights at another place
    if keys:
        raise InputError(
            f"this folder was made with other settings: {', '.join(_change(key, before, now) for key in keys)}",
            where=folder,
            fix="give another --name, or --overwrite to make it again",
        )


def remember(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings that a run folder is made with."""
    write_text(folder / RECORDS / SETTINGS, json.dumps(settings, indent=1, sort_keys=True))


def _change(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = before.get(key), now[key]
    if isinstance(old, dict) and isinstance(new, dict):
        inner = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
        return ", ".join(f"{name} {old.get(name)} (now {new.get(name)})" for name in inner)
    return key if key == "checkpoint" else f"{key.replace('_', ' ')} {old} (now {new})"
