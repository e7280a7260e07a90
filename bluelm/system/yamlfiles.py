"""Reads untrusted YAML within the bounds of `bluelm/system/reading.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import yaml

from bluelm.errors import InputError
from bluelm.system.reading import MOST_DEPTH, read_text, walk

MOST_YAML_BYTES = 1 << 20  # a recipe that names every linear of 100 blocks has 50 kB
MOST_VALUES = 50_000  # in one YAML file, aliases counted as often as they stand for something
MOST_ALIASES = 1000

# PyYAML's constructors let these through on tags that do not fit their value: !!int "", !!timestamp x, !!bool z
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def read_yaml(path: Path, what: str = "the file") -> Any:
    """A YAML file as text, numbers, booleans, nulls, lists and dictionaries; a date is text.

    Raises:
        InputError: it cannot be read, is no YAML, or is too large: in bytes, in depth, in digits, by its aliases.
    """
    text = read_text(path, MOST_YAML_BYTES, what)
    try:
        _check_events(text)
        data = yaml.load(text, _Loader)
        for value in walk(data, MOST_VALUES):
            if not isinstance(value, str | int | float | bool | list | dict | None):
                raise ValueError(f"{type(value).__name__} is not allowed in such a file")
    except _NOT_YAML as error:
        problem = f"{what} is not YAML that can be read: {_reason(error)}"
        raise InputError(problem, where=path, fix="correct the file") from None
    return data


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "too deep"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    if isinstance(error, ValueError | yaml.YAMLError):
        return str(error)
    return "a tag does not fit its value"


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where PyYAML was built with it


class _Loader(_Base):
    """PyYAML's safe loader without dates, and with bounds on what makes more of less."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in rows if tag != "tag:yaml.org,2002:timestamp"]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: Any) -> None:
        """`<<` copies, and what was copied is copied again."""
        super().flatten_mapping(node)
        if len(node.value) > 10 * MOST_ALIASES:
            raise ValueError(f"more than {10 * MOST_ALIASES} keys in one mapping")

    def number(self, node: Any) -> Any:
        """1:1:1:… is a number in base 60, of any length."""
        if len(str(node.value)) > 100:
            raise ValueError("a number of more than 100 characters")
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_constructor(_tag, _Loader.number)


def _check_events(text: str) -> None:
    """What libyaml sees before anything is made of it: aliases and depth.

    Raises:
        ValueError: too many.
    """
    depth = aliases = 0
    for count, event in enumerate(yaml.parse(text, _Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if count > 2 * MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values")
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} nested brackets")
        if aliases > MOST_ALIASES:
            raise ValueError(f"more than {MOST_ALIASES} aliases")
