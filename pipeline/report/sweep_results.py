"""Results of a sweep: the Pareto-optimal variants, a table, a file, a plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bluelm.errors import BudgetError
from bluelm.system.files import write_text
from pipeline.commands.devices import table

RESULTS = "sweep"


@dataclass(frozen=True)
class VariantRow:
    """What a variant came to; figures are None where it has none (then `problem` says why)."""

    name: str
    method: str
    bits: str
    group_size: str
    target: str
    exit_code: int
    size_bytes: float | None = None
    decode_tokens_s: float | None = None
    how: str = ""
    mean_kl: float | None = None
    perplexity_ratio: float | None = None
    pareto: bool = False
    problem: str = ""
    emulated_by: str = ""
    """What answered in the phone's place where the KL was taken."""


def mark_pareto(rows: Iterable[VariantRow]) -> list[VariantRow]:
    """Mark each row that no other of its target beats: no larger, no slower, no worse, and better in one.

    Speeds of one target only compare where they were got in the same way, so each way is judged for itself.
    """
    found = list(rows)
    return [VariantRow(**{**asdict(row), "pareto": _undominated(row, found)}) for row in found]


def _undominated(row: VariantRow, rows: Sequence[VariantRow]) -> bool:
    cost = _cost(row)
    if cost is None:
        return False
    rivals = [c for r in rows if (r.target, r.how) == (row.target, row.how) and (c := _cost(r)) is not None]
    return not any(rival != cost and all(a <= b for a, b in zip(rival, cost, strict=True)) for rival in rivals)


def _cost(row: VariantRow) -> tuple[float, float, float] | None:
    """Size, slowness, error: less is better. None where one is not known, or no number."""
    if row.size_bytes is None or row.mean_kl is None:
        return None
    cost = (row.size_bytes, -(row.decode_tokens_s or 0.0), row.mean_kl)
    return cost if all(map(math.isfinite, cost)) else None


def lines(rows: Sequence[VariantRow]) -> Iterator[str]:
    """The table; * marks what no other variant of the target beats in size, speed and error at once."""
    from eval.report import MARK

    head = ("", "variant", "MB", "decode tokens/s", "how", "mean KL", "perplexity ratio", "budget")
    verdicts = {0: "passed", BudgetError.exit_code: "FAILED"}
    yield from table(
        head,
        [
            (
                "*" if row.pareto else "",
                row.name,
                _text(row.size_bytes and row.size_bytes / 1e6, ".2f"),
                _text(row.decode_tokens_s, ".1f"),
                row.how,
                _text(row.mean_kl, ".5f") + (f" {MARK}" if row.emulated_by else ""),
                _text(row.perplexity_ratio, ".4f") + (f" {MARK}" if row.emulated_by else ""),
                verdicts.get(row.exit_code, f"exit {row.exit_code}: {row.problem}"),
            )
            for row in rows
        ],
    )
    for by in sorted({row.emulated_by for row in rows if row.emulated_by}):
        yield f"{MARK} emulated: {by}"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_results(rows: Sequence[VariantRow], out: Path) -> list[Path]:
    """sweep.csv and, where a variant has figures, sweep.svg."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(VariantRow.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    path = out / f"{RESULTS}.csv"
    write_text(path, text.getvalue())
    written = [path]
    if any(_cost(row) is not None for row in rows):
        draw(rows, out / f"{RESULTS}.svg")
        written.append(out / f"{RESULTS}.svg")
    return written


def draw(rows: Sequence[VariantRow], path: Path) -> None:
    """Size against error, colour is speed; what no other beats is ringed and joined."""
    from pipeline.report.drawing import drawing

    shown = [row for row in rows if _cost(row) is not None]
    with drawing(path, xlabel="size [MB]", ylabel="mean KL [nats/token]") as axes:
        sizes = [(row.size_bytes or 0) / 1e6 for row in shown]
        errors = [row.mean_kl or 0 for row in shown]
        speeds = [row.decode_tokens_s or 0 for row in shown]
        points = axes.scatter(sizes, errors, c=speeds, cmap="viridis", s=60, zorder=3)
        for target in dict.fromkeys(row.target for row in shown):
            best = sorted(
                ((row.size_bytes or 0) / 1e6, row.mean_kl or 0) for row in shown if row.pareto and row.target == target
            )
            axes.plot(*zip(*best, strict=True), marker="o", markersize=11, fillstyle="none", label=target)
        for row, x, y in zip(shown, sizes, errors, strict=True):
            axes.annotate(row.name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7)
        axes.figure.colorbar(points, label="decode [tokens/s]")
        axes.legend(title="not beaten by another, by target")
