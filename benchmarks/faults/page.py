"""Makes results/faults.json and faults.md of what `benchmarks.faults` left in its folders.

python -m benchmarks.faults.page OUT [OUT ...]

Faults at random, bits in each kept file and kills of children alone are parts of their own: one that the folders hold
no trials of stays as it was.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.faults.kinds import CHILD, EACH, FAULTS, KILLED
from benchmarks.gate.bench import Results

Row = dict[str, Any]
COMMAND = "python -m benchmarks.faults OUT; python -m benchmarks.faults.page OUT"
KEY = ("subject", "fault", "number")
PARTS = {"faults": [name for name in FAULTS if name not in (*EACH, CHILD)], "each": [*EACH], "children": [CHILD]}


def summed(rows: list[Row], names: Sequence[str] = tuple(FAULTS)) -> Row:
    """Counts, and a table: a row a fault of these names, a column a command."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    hit = [row for row in rows if row["result"] != "not hit"]
    counts = Counter((row["fault"], row["subject"], row["result"]) for row in hit)

    def cell(name: str, subject: str) -> str:
        same, clear, wrong = (counts[name, subject, result] for result in ("identical", "clear end", "FAULT"))
        tried = same + clear + wrong
        if not tried:
            return ""
        told = [f"{same} identical"] if same else []
        return ", ".join(told + [f"{clear} refused"] * bool(clear) + [f"**{wrong} wrong**"] * bool(wrong))

    codes = Counter(row["first"] for row in hit if row["first"] >= 0 and not row["fault"].startswith("a flipped"))
    return {
        "tried": len(hit),
        "not_hit": len(rows) - len(hit),
        "identical": sum(row["result"] == "identical" for row in hit),
        "refused": sum(row["result"] == "clear end" for row in hit),
        "kills": sum(row["fault"] in KILLED for row in hit),
        "kills_identical": sum(row["fault"] in KILLED and row["result"] == "identical" for row in hit),
        "signals": sum(row["fault"].startswith("SIG") for row in hit),
        "signals_identical": sum(row["fault"].startswith("SIG") and row["result"] == "identical" for row in hit),
        "each": sum(row["fault"] in EACH for row in hit),
        "children": sum(row["fault"] == CHILD for row in hit),
        "child_codes": sorted({row["first"] for row in hit if row["fault"] == CHILD}),
        "kept": sum(row["kept"] for row in hit if row["fault"] in KILLED),
        "processes_left": sum(row["left"] for row in hit),
        "users_files_gone": sum(row["notes"] != 2 for row in hit),
        "made_again": sum(bool(row["lost"]) for row in hit if row["fault"] in KILLED),
        "codes": {str(code): count for code, count in sorted(codes.items())},
        "wrong": [
            f"{row['subject']}, {row['fault']} {row['number']} ({row['hit']}): {row['why'][:200]}"
            for row in hit
            if row["result"] == "FAULT"
        ],
        "table": {
            "columns": ["fault", *subjects],
            "rows": [[name, *(cell(name, subject) for subject in subjects)] for name in names],
        },
    }


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    paths = [path for name in sys.argv[1:] for path in sorted(Path(name).glob("trials-*.jsonl"))]
    rows = [row for path in paths for row in Results(path, KEY)]
    found = pages.results("faults") if pages.results_file("faults").is_file() else {}
    for part, names in PARTS.items():
        of_part = [row for row in rows if row["fault"] in names]
        if of_part:
            found[part] = {**summed(of_part, names), "made": {**pages.stamp(), "command": COMMAND}}
    pages.save("faults", found)


if __name__ == "__main__":
    main()
