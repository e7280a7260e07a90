"""Results of benchmarks as files, and the pages that are made of them.

A command writes `results/NAME.json`, and `NAME.md` is `pages/NAME.md.jinja` filled in with it. `results/cited.yaml`
lists what the README and docs/ say of results. `python -m benchmarks.pages` renders every page again.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bluelm.files import write_text

HERE = Path(__file__).parent
RESULTS, PAGES = HERE / "results", HERE / "pages"


def names() -> list[str]:
    """Every page that is rendered."""
    return sorted(path.name.removesuffix(".md.jinja") for path in PAGES.glob("*.md.jinja"))


def results(name: str) -> dict[str, Any]:
    """What a benchmark's command wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source(place: str) -> dict[str, Any]:
    """Figures that may be cited: of a benchmark by its name, or of a file of the project by its path."""
    path = HERE.parent / place if "/" in place else RESULTS / f"{place}.json"
    text = path.read_text(encoding="utf-8")
    found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def render(name: str) -> str:
    """The page of a benchmark, from its results; a figure that they lack is an error."""
    environment = Environment(
        loader=FileSystemLoader(PAGES), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["of"] = lambda value, form: format(value, form)
    environment.globals |= {"table": table, "made": made, "results": results}
    return environment.get_template(f"{name}.md.jinja").render(results(name))


def made(part: dict[str, Any]) -> str:
    """When, where and of which commit a part of the results was measured; rows that are older have their own words."""
    earlier = [f" Not measured again: {'; '.join(one['rows'])} ({_told(one)})." for one in part.get("earlier", [])]
    return f"Measured {_told(part['made'])}.{''.join(earlier)}"


def _told(about: dict[str, Any]) -> str:
    where = f" ({about['machine']})" if "machine" in about else ""
    taken = f", {about['note']}" if "note" in about else ""
    return f"{about['day']}{where}, commit {about['commit']}{taken}"


def table(found: dict[str, Any]) -> str:
    """Columns and rows of text as a Markdown table; `align` may say how columns are set."""
    columns = found["columns"]
    marks = found.get("align") or ["---"] * len(columns)
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(marks)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in found["rows"])])


def save(name: str, found: dict[str, Any], *, part: str | None = None) -> None:
    """Write a benchmark's results and its page.

    Args:
        part: only this key of the results is new; the others stay. It is stamped with day, commit and machine.
    """
    path = RESULTS / f"{name}.json"
    if part is not None:
        before = results(name) if path.is_file() else {}
        found = {**before, part: {**found, "made": stamp()}}
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(HERE / f"{name}.md", render(name))


def save_rows(
    name: str,
    part: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    names: Iterable[str] | None = None,
    key: int = 1,
    **about: Any,
) -> None:
    """Put rows into the table of a part, each in place of the one of its name: its first `key` cells.

    A row that is not measured again stays, with the day and commit of its own measurement, unless columns or `about`
    are others now: then it belongs to another table, and goes.

    Args:
        rows: all that this call has made so far.
        names: of every row that the command can make, in the page's order; others go. None: as they came.
        about: what holds for all rows, e.g. a text's name; fields of the part.
    """
    before = results(name).get(part, {}) if (RESULTS / f"{name}.json").is_file() else {}
    same = bool(before) and before["table"]["columns"] == [*columns] and before.items() >= about.items()
    kept = {row_name(row, key): row for row in before["table"]["rows"]} if same else {}
    new = {row_name(row, key): [*row] for row in rows}
    found = kept | new
    order = [row for row in (found if names is None else names) if row in found]
    part_found = {**about, "table": {"columns": [*columns], "rows": [found[row] for row in order]}}
    earlier = _earlier(before, [row for row in order if row not in new])
    save(name, part_found | ({"earlier": earlier} if earlier else {}), part=part)


def row_name(row: Sequence[str], key: int) -> str:
    """What tells a row of a table from the others."""
    return ", ".join(cell for cell in row[:key] if cell)


def _earlier(before: dict[str, Any], left: list[str]) -> list[dict[str, Any]]:
    """Stamps of rows that stay, each with the rows that it holds for."""
    older = before.get("earlier", [])
    known = {row for stamped in older for row in stamped["rows"]}
    stamps = [{**before["made"], "rows": [row for row in left if row not in known]}] if left else []
    stamps += [{**stamped, "rows": [row for row in left if row in stamped["rows"]]} for stamped in older]
    return [stamped for stamped in stamps if stamped["rows"]]


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
    return f"benchmarks.{Path(sys.argv[0]).stem}"


if __name__ == "__main__":
    for page in names():
        write_text(HERE / f"{page}.md", render(page))
