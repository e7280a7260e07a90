"""Numbers that are none, are infinite or beyond all use: exit 2 before any work, whatever takes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import typer
from pydantic import BaseModel
from typer.main import get_command

from bluelm.errors import InputError
from compress import methods
from compress.recipe import Recipe
from eval.budget import budget_file
from pipeline import cli
from pipeline.cli import main
from pipeline.commands.generate import pick
from pipeline.options.bounds import fault

ODD = ("nan", "inf", "-inf", "infinity", "1e400", "1e300")


def commands(
    app: typer.Typer = cli.app, before: tuple[str, ...] = (), group: Any = None
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Words, command and function of every command there is; no words for the run itself."""
    group = group or get_command(app)
    if app.registered_callback is not None:
        yield before, group, app.registered_callback.callback
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__.replace("_", "-")
        yield (*before, name), group.commands[name], info.callback
    for inner in app.registered_groups:
        assert inner.typer_instance is not None and isinstance(inner.name, str)
        yield from commands(inner.typer_instance, (*before, inner.name), group.commands[inner.name])


def numbers(kind: type) -> list[tuple[tuple[str, ...], str, list[str]]]:
    """Every option that takes such a number: the words of its command, its name, and what must be given beside it."""
    found = []
    for name, command, function in commands():
        hints = get_type_hints(function)
        needed = [[p.opts[0], "1"] if p.opts[0].startswith("-") else ["1"] for p in command.params if p.required]
        words = [word for pair in needed for word in pair]
        for parameter in command.params:
            kinds = get_args(hints[parameter.name]) or (hints[parameter.name],)
            if kind in kinds and parameter.opts[0].startswith("-"):
                found.append((name, parameter.opts[0], words))
    return found


def test_every_command_and_kind_of_option_is_walked() -> None:
    group: Any = get_command(cli.app)
    assert {words[0] for words, _, _ in commands() if words} == set(group.commands)
    options = {(" ".join(words), option) for words, option, _ in numbers(float)}
    assert options >= {("", "--device-ram"), ("", "--max-kl"), ("plan", "--max-kl"), ("quantize", "--max-kl")}
    assert options >= {("generate", "--temperature"), ("fetch", "--slowest"), ("verify", "--load-limit")}


@pytest.mark.parametrize(("name", "option", "words"), numbers(float), ids=str)
def test_a_number_is_finite(
    name: tuple[str, ...], option: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    for text in ODD:
        with pytest.raises(SystemExit) as left:
            main([*name, *words, f"{option}={text}"])
        said = capfd.readouterr().err
        assert left.value.code == 2, (text, said)
        assert f"Invalid value for '{option}'" in said, (text, said)
        assert "give " in said or "should be" in said, (text, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "option", "words"), numbers(int), ids=str)
def test_a_whole_number_fits_64_bits(
    name: tuple[str, ...], option: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (str(2**63), "9" * 4000, "9" * 5000):
        with pytest.raises(SystemExit) as left:
            main([*name, *words, f"{option}={text}"])
        assert left.value.code == 2
        assert option in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_usual_is_let_through() -> None:
    for value in (0, 0.0, -1, 2.5, 1e9, 2**63 - 1, True, None, "inf", Path("nan")):
        assert fault(value) == ""
    assert (
        "2.5" in fault(math.nan)
        and "at most 1000000000" in fault(2e9)
        and "at most 9223372036854775807" in fault(2**63)
    )


def fractions(model: type[BaseModel]) -> list[str]:
    """Its fields that are numbers with a fraction."""
    fields = model.model_fields.items()
    return [name for name, field in fields if float in (*get_args(field.annotation), field.annotation)]


@pytest.mark.parametrize("text", (".inf", "-.inf", ".nan", "1.0e+400", "'inf'", "'nan'"))
def test_files_of_settings(text: str, tmp_path: Path) -> None:
    """Every number of a recipe and of a budget, by its schema."""
    path = tmp_path / "x.yaml"
    recipe = fractions(Recipe)
    assert "max_kl" in recipe
    lines = [f"bits: auto\n{name}: {text}\n" for name in recipe]
    assert {"damping", "correction"} <= {name for kind in methods.option_types() for name in fractions(kind)}
    for kind in methods.option_types():
        lines += [f"{kind.section}: {{{name}: {text}}}\n" for name in fractions(kind)]
        lines += [f"{name}: {text}\n" for name in fractions(kind) if kind.at_top]
    for line in lines:
        path.write_text(line)
        with pytest.raises(InputError):
            Recipe.load(path)
    limits = [name for name in budget_file.BudgetFile.model_fields if name.startswith(("max_", "min_"))]
    forms = [f"{name}: {text}" for name in limits]
    forms += [f"{name}: {{at_most: {text}}}" for name in limits if name.startswith("max_")]
    forms += [f"{name}: {{at_least: {text}}}" for name in limits if name.startswith("min_")]
    forms += [f"max_mean_kl: 1\nsizes: [{{up_to: {text}, max_mean_kl: 1}}]"]
    for form in forms:
        path.write_text(form)
        with pytest.raises(InputError):
            budget_file.load(path)


def test_a_temperature_close_to_0_takes_the_likeliest() -> None:
    logits = np.array([1, 3, 2], np.float32)
    assert {pick(logits, 1e-320, np.random.default_rng(seed)) for seed in range(9)} == {1}
    assert pick(logits, 1e9, np.random.default_rng(0)) in (0, 1, 2)
