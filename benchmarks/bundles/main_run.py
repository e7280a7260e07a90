"""What the README shows of `make run`: `python -m benchmarks.bundles.main_run RUN` reads the report of such a run.

Writes results/main_run.json; the README holds its lines word for word (tests/project/test_benchmark_pages.py).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import pages
from eval.report import Report, show

CHECKS = ("max_perplexity_ratio (npu)", "max_mean_kl (npu)", "min_top1_agreement (npu)")
ROWS = (
    "tokens judged", "documents judged", "perplexity", "perplexity of the float32 model", "ratio of the two",
    "mean KL, nats a token", "top-1 agreement", "KL to its own weights, worst positions",
    "KL of decode to prefill, worst positions", "bits a weight, in the files",
)  # fmt: skip


def main(run: Path) -> None:
    report = Report.open(run)
    out = io.StringIO()
    show(report, Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("Accuracy")) :]
    rows = [next(line for line in table if line.startswith(f"│ {name} ")) for name in ROWS]
    figures = {(m.name, m.subject): m.value for m in report.measurements}
    found = {
        "verdict": next(line.strip() for line in lines if line.startswith(("PASSED", "FAILED"))),
        "checks": [next(line.strip() for line in lines if name in line).partition(";")[0] for name in CHECKS],
        "rows": [[cell.strip() for cell in row.strip("│").split("│")] for row in rows],
        "parameters": report.details["artifacts"]["npu"]["parameters"],
        "parameters_m": f"{report.details['artifacts']['npu']['parameters'] / 1e6:.1f}",
        "peak_gb": f"{figures['peak_memory_bytes', 'run'] / 1e9:.1f}",
        "artifact_mb": f"{figures['artifact_bytes', 'files'] / 1e6:.1f}",
        "made": {**pages.stamp(), "command": "make run"},
    }
    pages.save("main_run", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
