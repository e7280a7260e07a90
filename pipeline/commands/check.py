"""Compares the figures of a finished run with a budget again."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bluelm.errors import BudgetError, InputError
from eval.baseline import regressions
from eval.budget import budget_file
from eval.budget.budget import Verdict, judge
from eval.budget.limits import Budget
from eval.report import Report, show_verdict
from pipeline.commands.report import write_all
from pipeline.report.ci_outputs import announce
from pipeline.report.page import PAGE
from pipeline.run.binding import missing, open_run


def check(run: Path, budget: Path | None, baseline: Path | None, out: Path | None, console: Console) -> int:
    """Print the verdict; the exit code is 0 or, if the budget fails or the run is worse than the baseline, 3.

    Args:
        budget: None: the limits that the run itself was judged by.
        baseline: folder or report.json of an earlier run.
        out: folder that a report with this verdict is written into; the run's own stays as it is.

    Raises:
        InputError: not a finished run, another artifact than the report's lies there (in the baseline's folder,
            too), or a bad budget.
    """
    report = open_run(run)
    for name in missing(run, report):
        text = f"The {name} artifact is not here: this is the verdict on files whose digests the report names."
        console.print(text, highlight=False, soft_wrap=True)
    limits = Budget.model_validate(report.budget) if budget is None else limits_for(report, budget)
    verdict = judge(limits, report.measurements, tuple(report.artifacts), report.samples)
    if baseline is not None:
        before = Report.read(baseline) if baseline.is_file() else open_run(baseline)
        found = regressions(report, before, limits.confidence)
        if not found:
            fix = "name a run of the same target"
            raise InputError("the baseline has no figure in common with the run", where=baseline, fix=fix)
        verdict = Verdict((*verdict.checks, *found))
    judged = report.model_copy(
        update={
            "passed": verdict.passed,
            "checks": verdict.checks,
            "budget": limits.model_dump(mode="json", exclude_none=True),
        }
    )
    show_verdict(report.title, verdict, console, report.not_known)
    if out is not None:
        judged.save(out)
        write_all(judged, out)
        console.print(f"\nReport: {out / PAGE}", highlight=False, soft_wrap=True)
    announce(judged)
    return 0 if verdict.passed else BudgetError.exit_code


def limits_for(report: Report, budget: Path) -> Budget:
    """The limits of a file for the target and the size of model that a run was made for."""
    artifacts = report.details.get("artifacts", {})
    first = next((artifacts[name] for name in report.artifacts if name in artifacts), {})
    target = report.target.partition(" ")[0]
    names = (first.get("format", ""), target, report.configuration.get("soc", ""))
    return budget_file.load(budget, names=tuple(n for n in names if n), parameters=first.get("parameters"))
