"""How often confidence bounds hold: documents drawn from a known population (`tests/eval/budget/test_coverage.py`).

`python -m benchmarks.accuracy.coverage` writes results/accuracy/coverage.json and the page.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks import pages
from tests.eval.budget import test_coverage as simulation

COLUMNS = (
    "documents", "population", "by document: below the upper bound", "above the lower",
    "by window: below the upper bound", "above the lower",
)  # fmt: skip
SIZES = {
    "40 of 4 windows": simulation.equal,
    "40 of 1 to 8": simulation.unequal,
    "few, of 2 to 4": simulation.few,
    "one of 40, and 40 of 2": simulation.one_long,
}
OUTWEIGHED = "one of 40, and 40 of 2"  # by document its bounds are wider than they say


def main() -> None:
    rows: list[list[str]] = []
    shares: dict[str, list[tuple[float, float]]] = {"normal": [], "skewed": [], "by window": []}
    for documents, sizes in SIZES.items():
        for population in ("normal", "skewed"):
            ours, by_window = (
                simulation.coverage(sizes, by_document=by_document, skewed=population == "skewed")
                for by_document in (True, False)
            )
            rows.append([documents, population, *(f"{share:.1%}" for share in (*ours, *by_window))])
            shares["by window"].append(by_window)
            if documents != OUTWEIGHED:
                shares[population].append(ours)
    told: dict[str, Any] = {
        "normal": _range(share for pair in shares["normal"] for share in pair),
        "skewed_upper": _range(upper for upper, _ in shares["skewed"]),
        "by_window": _range(share for pair in shares["by window"] for share in pair),
    }
    pages.save_rows("coverage", "simulation", COLUMNS, rows, key=2, draws=simulation.DRAWS, **told)


def _range(shares: Iterable[float]) -> str:
    """The smallest and the largest, in percent."""
    found = sorted(shares)
    return f"{100 * found[0]:.0f} to {100 * found[-1]:.0f} %"


if __name__ == "__main__":
    main()
