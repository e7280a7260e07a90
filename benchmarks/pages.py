"""Results of benchmarks as files, and the pages that are made of them.

A command of the package PART writes `results/PART/NAME.json`, and `PART/NAME.md` is `pages/PART/NAME.md.jinja` filled
in with it; without PART where the command has a folder to itself or none. `results/cited.yaml` lists what the README
and docs/ say of results. `python -m benchmarks.pages` renders every page again.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bluelm.system.files import write_text

HERE = Path(__file__).parent
RESULTS, PAGES = HERE / "results", HERE / "pages"


def names() -> list[str]:
    """Every page that is rendered."""
    return sorted(path.name.removesuffix(".md.jinja") for path in PAGES.rglob("*.md.jinja"))


def template(name: str) -> Path:
    """Of a page."""
    return PAGES / _part(name) / f"{name}.md.jinja"


def results_file(name: str) -> Path:
    """What a benchmark's command writes."""
    return RESULTS / _part(name) / f"{name}.json"


def page_file(name: str) -> Path:
    """The rendered page."""
    return HERE / _part(name) / f"{name}.md"


def _part(name: str) -> Path:
    """Folder of a benchmark's files within `pages`; those without a page are not in any."""
    found = next(PAGES.rglob(f"{name}.md.jinja"), PAGES / name)
    return found.parent.relative_to(PAGES)


def results(name: str) -> dict[str, Any]:
    """What a benchmark's command wrote."""
    return json.loads(results_file(name).read_text(encoding="utf-8"))


def source(place: str) -> dict[str, Any]:
    """Figures that may be cited: of a benchmark by its name, of a file by its path.

    A part with a table has its cells under `cells`, by the row's first two cells and the column.
    """
    path = HERE.parent / place if "/" in place else results_file(place)
    text = path.read_text(encoding="utf-8")
    found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return {str(key).replace("-", "_"): _with_cells(value) for key, value in found.items()}


def _with_cells(part: Any) -> Any:
    if not isinstance(part, dict) or "table" not in part:
        return part
    columns, rows = part["table"]["columns"], part["table"]["rows"]
    return {**part, "cells": {row_name(row, 2): dict(zip(columns, row, strict=True)) for row in rows}}


def render(name: str) -> str:
    """The page of a benchmark, from its results; a figure that they lack is an error."""
    environment = Environment(
        loader=FileSystemLoader(PAGES), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["of"] = lambda value, form: format(value, form)
    environment.globals |= {"table": table, "made": made, "results": results}
    return environment.get_template(template(name).relative_to(PAGES).as_posix()).render(results(name))


def made(part: dict[str, Any]) -> str:
    """The sentence that says when, where and of which commit a part of the results was measured."""
    now = part["made"]
    others = [one for one in part.get("earlier", []) if _when(one) != _when(now)]
    older = "; ".join(dict.fromkeys(f"those of commit {one['commit']} {one['day']}{_note(one)}" for one in others))
    told = f"Measured {now['day']} ({now['machine']}), commit {now['commit']}{_note(now)}"
    return f"{told}{f', but for older rows: {older}' if older else ''}."


def _when(about: dict[str, Any]) -> str:
    return f"{about['day']}, {about['commit']}"


def _note(about: dict[str, Any]) -> str:
    return f", {about['note']}" if "note" in about else ""


def table(part: dict[str, Any]) -> str:
    """Columns and rows of text as a Markdown table; rows that are not all of one day and commit say which."""
    found = part["table"]
    columns, rows = found["columns"], found["rows"]
    stamps = [part["made"], *part.get("earlier", [])]
    told = [_when(stamps[age]) for age in found.get("ages", [0] * len(rows))]
    if len(set(told)) > 1:
        columns, rows = [*columns, "measured"], [[*row, when] for row, when in zip(rows, told, strict=True)]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def save(name: str, found: dict[str, Any]) -> None:
    """Write a benchmark's results, and its page where it has one."""
    results_file(name).parent.mkdir(parents=True, exist_ok=True)
    write_text(results_file(name), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if name in names():
        page_file(name).parent.mkdir(parents=True, exist_ok=True)
        write_text(page_file(name), render(name))


def save_rows(
    name: str,
    part: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    names: Iterable[str] | None = None,
    key: int = 1,
    beside: Mapping[str, Any] | None = None,
    **about: Any,
) -> None:
    """Put rows into the table of a part, each in place of the one of its name: its first `key` cells.

    A row that is not measured again stays, with the day and commit of its own measurement, unless columns or `about`
    are others now: then it belongs to another table, and goes.

    Args:
        rows: all that this call has made so far.
        names: of every row that the command can make, in the page's order; others go. None: as they came.
        beside: fields of the part that say nothing of how rows were measured, so that they stay when these change.
        about: what holds for all rows, e.g. a text's name; fields of the part.
    """
    parts = results(name) if results_file(name).is_file() else {}
    before = parts.get(part, {})
    same = bool(before) and before["table"]["columns"] == [*columns] and before.items() >= about.items()
    kept = {row_name(row, key): (row, stamped) for row, stamped in _stamped(before)} if same else {}
    found = kept | {row_name(row, key): ([*row], None) for row in rows}
    chosen = [found[row] for row in (found if names is None else names) if row in found]
    earlier: list[dict[str, Any]] = []
    for _, stamped in chosen:
        if stamped is not None and stamped not in earlier:
            earlier.append(stamped)
    made_of = {"columns": [*columns], "rows": [row for row, _ in chosen]}
    if earlier:
        made_of["ages"] = [0 if stamped is None else 1 + earlier.index(stamped) for _, stamped in chosen]
    new = {**about, **(beside or {}), "table": made_of, "made": stamp(), **({"earlier": earlier} if earlier else {})}
    save(name, {**parts, part: new})


def row_name(row: Sequence[str], key: int) -> str:
    """What tells a row of a table from the others."""
    return ", ".join(row[:key])


def _stamped(part: dict[str, Any]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Each row of a part, with when and of which commit it is."""
    rows, stamps = part["table"]["rows"], [part["made"], *part.get("earlier", [])]
    for row, age in zip(rows, part["table"].get("ages", [0] * len(rows)), strict=True):
        yield row, stamps[age]


def stamp() -> dict[str, str]:
    """When, of which commit, where, by which call."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "day": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def _module() -> str:
    path = Path(sys.argv[0]).resolve()
    if path.stem == "__main__":  # a package with a command of its own
        path = path.parent
    home = HERE if path.is_relative_to(HERE) else path.parent
    return ".".join(("benchmarks", *path.relative_to(home).with_suffix("").parts))


if __name__ == "__main__":
    for page in names():
        write_text(page_file(page), render(page))
