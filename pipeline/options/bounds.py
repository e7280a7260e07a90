"""Refuses infinite, NaN and absurdly large numbers in every option of every command."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import typer

LARGEST = 1e9  # of a number with a fraction: thirty years in seconds, an exabyte in GB; clocks and waits take no more
LARGEST_WHOLE = 2**63 - 1


def hold_to_bounds(command: Any) -> Any:
    """The same command, whose options (and those of its commands) are looked at before it does anything."""
    for inner in getattr(command, "commands", {}).values():
        hold_to_bounds(inner)
    if command.callback is not None:
        options = {p.name: "/".join(p.opts) for p in command.params}
        command.callback = _checked(command.callback, options)
    return command


def _checked(callback: Callable[..., Any], options: dict[str, str]) -> Callable[..., Any]:
    def checked(*arguments: Any, **values: Any) -> Any:
        for name, value in values.items():
            for one in value if isinstance(value, list | tuple) else (value,):
                problem = fault(one)
                if problem:
                    raise typer.BadParameter(problem, param_hint=f"'{options.get(name, name)}'")
        return callback(*arguments, **values)

    return checked


def fault(value: object) -> str:
    """What is wrong with an option's value, and what to give; "" for anything but such a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number; give one in digits, such as 2.5, or omit the option."
    largest = LARGEST if isinstance(value, float) else LARGEST_WHOLE
    if isinstance(value, int | float) and abs(value) > largest:
        return f"the number is too large; give at most {int(largest)}, or omit the option."
    return ""
