"""Budget files: limits for every run, laid over by those of a target and of a model's size.

    extends: default                   # or a file beside this one, or a list of them
    max_perplexity_ratio: 1.02
    max_mean_kl: {at_most: 0.01, accept: [measured]}    # any limit may say which kinds of figure pass it
    sizes:                             # a model takes the first row that it is no larger than
      - up_to: 1.5B
        max_perplexity_ratio: 1.04
    targets:
      snapdragon:                      # a target, a chip or a runtime
        max_artifact_bytes: 2 GB
        sizes: [{up_to: 4B, max_artifact_bytes: 2 GB}]

Later ones count: what is extended, then the file's own limits, its sizes, the runtime, the target, the chip, and the
sizes of each. `null` takes a limit away. With CI=true `require_runner` holds, unless a file says false, for runtimes
that have a runner. `data/budget.schema.json` is the JSON schema.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from bluelm.errors import InputError
from bluelm.system.yamlfiles import read_yaml
from eval.budget.limits import MAPPING, NUMBER, Budget, DomainLimits, SpeedLimit
from export import formats

DEFAULT_BUDGET = Path(__file__).parents[1] / "data" / "budget.yaml"
SCHEMA = Path(__file__).parents[1] / "data" / "budget.schema.json"
DEFAULT = "default"
MOST_FILES = 64  # that a budget may extend, one as often as it is met
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}


def _count(value: Any) -> Any:
    """ "1.5B" as a number."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMB]?)\s*", value) if isinstance(value, str) else None
    return float(match[1]) * _UNITS[match[2]] if match and match[1].count(".") < 2 else value


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Parameters = Annotated[
    float,
    BeforeValidator(_count),
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}], "examples": ["1.5B"]}),
]
_STRINGS = {"type": "array", "items": {"type": "string"}}


class SizeLimits(Budget):
    """Limits of models of at most so many parameters."""

    up_to: Parameters


class TargetLimits(Budget):
    """Limits of one target, chip or runtime."""

    sizes: tuple[SizeLimits, ...] = ()


class BudgetFile(TargetLimits):
    """What a budget file may hold."""

    model_config = ConfigDict(title="bluelm-export budget", frozen=True, extra="forbid", allow_inf_nan=False)
    extends: Annotated[
        tuple[str, ...], BeforeValidator(_listed), WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS]})
    ] = ()
    targets: Annotated[dict[str, TargetLimits], Field(description="by target, chip or runtime")] = Field(default={})


_SHAPE = ("up_to", "sizes", "extends", "targets")


def load(path: Path, *, names: tuple[str, ...] = (), parameters: float | None = None) -> Budget:
    """The limits of a file that hold for one run.

    Args:
        names: of the run's runtime, target and chip; sections of `targets` of these names count, in this order.
        parameters: of the model; None: `sizes` are left aside.

    Raises:
        InputError: no such file, not YAML, an unknown key (a near one is suggested), a bad value, files that extend
            one another in a circle or more than `MOST_FILES` of them, or no limit for this run.
    """
    merged: dict[str, Any] = {}
    for layer in _layers(path, names, parameters, (), count()):
        merged = _over(merged, layer)
    if not any(value is not None for value in merged.values()):
        fix = f"write limits such as those in {DEFAULT_BUDGET}"
        raise InputError("the budget holds no limits", where=path, fix=fix)
    if _in_ci() and any(has_runner(name) for name in names):
        merged = {"require_runner": True} | merged
    return Budget.model_validate(merged)


def has_runner(name: str) -> bool:
    """Whether it is the name of a runtime whose artifacts are judged in the program that users open them with."""
    return name in formats.names() and isinstance(formats.record(name).runner, formats.StandardRunner)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("true", "1")


def json_schema() -> str:
    """The JSON schema of budget files, as published in `data/budget.schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **BudgetFile.model_json_schema()}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _layers(
    path: Path, names: tuple[str, ...], parameters: float | None, seen: tuple[Path, ...], met: Iterator[int]
) -> Iterator[dict[str, Any]]:
    """Limits as they were written, each to be laid over those before it."""
    try:
        here = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte
        where = f"{seen[-1]}, extends" if seen else repr(str(path))
        raise InputError(f"the budget cannot be read: {error}", where=where, fix="name a file") from None
    if here in seen:
        raise InputError("budgets extend one another in a cycle", where=path, fix="remove one `extends`")
    if next(met) > MOST_FILES:
        fix = "let fewer of them extend the same files"
        raise InputError(f"the budget extends more than {MOST_FILES} files", where=path, fix=fix)
    file = _read(path)
    for other in file.extends:
        base = DEFAULT_BUDGET if other == DEFAULT else path.parent / other
        yield from _layers(base, names, parameters, (*seen, here), met)
    yield from _limits(file, parameters)
    _check_names(path, file.targets)
    wanted = [name.lower() for name in names]
    sections = {name.lower(): limits for name, limits in file.targets.items()}
    for name in wanted:
        if name in sections:
            yield from _limits(sections[name], parameters)


def _limits(limits: TargetLimits, parameters: float | None) -> Iterator[dict[str, Any]]:
    """A section's own limits, then those of the model's size."""
    yield limits.model_dump(exclude_unset=True, exclude=set(_SHAPE))
    rows = sorted(limits.sizes, key=lambda row: row.up_to)
    row = next((r for r in rows if parameters is not None and parameters <= r.up_to), None)
    if row is not None:
        yield row.model_dump(exclude_unset=True, exclude=set(_SHAPE))


def _over(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`layer` laid over `base`, key by key, also inside of mappings: another number leaves what is accepted."""
    merged = dict(base)
    for key, value in layer.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, int | float):
            value = {"at_most" if key.startswith("max_") else "at_least": value}
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _check_names(path: Path, sections: Mapping[str, TargetLimits]) -> None:
    """Refuse a section that no run could ever take."""
    from export.formats import names as formats
    from targets.socs import table

    known = [*table().targets, *(soc.id for soc in table().socs), *formats()]
    for name in sections:
        if name.lower() not in (k.lower() for k in known):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise InputError("the budget names an unknown target", where=f"{path}, key targets.{name}", fix=fix)


def _read(path: Path) -> BudgetFile:
    content = read_yaml(path, "the budget")
    if not isinstance(content, dict) or not content:
        fix = f"write limits such as those in {DEFAULT_BUDGET}"
        raise InputError("the budget holds no limits", where=path, fix=fix)
    try:
        return BudgetFile.model_validate(content)
    except ValidationError as error:
        raise _explain(error, path) from error


def _explain(error: ValidationError, path: Path) -> InputError:
    """The first thing that pydantic found wrong, an unknown key before all else, in the user's words."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path_of_key = [str(part) for part in first["loc"] if part not in (MAPPING, NUMBER)]
    key = ".".join(path_of_key)
    where = f"{path}, key {key}"
    if first["type"] == "extra_forbidden":
        known = list(_holder(path_of_key[:-1]).model_fields)
        near = difflib.get_close_matches(path_of_key[-1], known, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return InputError("the budget has an unknown key", where=where, fix=fix)
    if first["type"] == "missing":
        return InputError("the budget lacks a value", where=where, fix=f"give {path_of_key[-1]}")
    problem = f"the budget's {key} cannot be {first['input']!r}: {first['msg']}"
    return InputError(problem, where=where, fix="correct the value")


def _holder(place: list[str]) -> type[BaseModel]:
    """The model that reads the keys at a place of the file."""
    inner = {"min_decode_tokens_per_s": SpeedLimit, "domains": DomainLimits, "sizes": SizeLimits}
    found = next((inner[part] for part in reversed(place) if part in inner), None)
    return found or (TargetLimits if place[:1] == ["targets"] else BudgetFile)
