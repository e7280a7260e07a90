"""Holds the figures of a finished run against a budget again."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bluelm.errors import BudgetError
from eval import budget_file
from eval.budget import Budget, judge
from eval.report import Report, show_verdict


def check(run: Path, budget: Path | None, console: Console) -> int:
    """Print the verdict; the exit code is 0 or, if the budget fails, 3.

    Args:
        budget: None: the limits that the run itself was judged by.

    Raises:
        InputError: not a finished run, or a bad budget.
    """
    report = Report.open(run)
    limits = Budget.model_validate(report.budget) if budget is None else limits_for(report, budget)
    verdict = judge(limits, report.measurements, tuple(report.artifacts), report.samples)
    show_verdict(report.title, verdict, console)
    return 0 if verdict.passed else BudgetError.exit_code


def limits_for(report: Report, budget: Path) -> Budget:
    """The limits of a file for the target and the size of model that a run was made for."""
    artifacts = report.details.get("artifacts", {})
    first = next((artifacts[name] for name in report.artifacts if name in artifacts), {})
    target = report.target.partition(" ")[0]
    names = (first.get("format", ""), target, report.configuration.get("soc", ""))
    return budget_file.load(budget, names=tuple(n for n in names if n), parameters=first.get("parameters"))
