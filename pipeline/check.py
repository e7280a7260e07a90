"""Holds the figures of a finished run against a budget again."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bluelm.errors import BudgetError
from eval.budget import DEFAULT_BUDGET, Budget, judge
from eval.report import Report, show_verdict


def check(run: Path, budget: Path | None, console: Console) -> int:
    """Print the verdict; the exit code is 0 or, if the budget fails, 3.

    Raises:
        InputError: not a finished run, or a bad budget.
    """
    limits = Budget.from_file(budget or DEFAULT_BUDGET)
    report = Report.open(run)
    verdict = judge(limits, report.measurements, tuple(report.artifacts))
    show_verdict(report.title, verdict, console)
    return 0 if verdict.passed else BudgetError.exit_code
