"""Appends a finished run to the history on this machine and, where one is named, to an MLflow server."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from bluelm.errors import ExportError
from eval.history import History, KeptRun, MlflowHistory
from eval.report import Report


def record(report: Report, history: Path | None, messages: Console) -> None:
    """Keep the run's figures. A history that cannot be written is told, but does not undo a finished run."""
    facts = {
        "configuration": report.configuration,
        "inputs": report.inputs,
        "versions": report.versions,
        "stages": [stage.model_dump() for stage in report.stages],
    }
    run = KeptRun(report.title, report.target, report.passed, report.measurements, facts)
    for store in (History(history), MlflowHistory.from_environment()):
        if store is None:
            continue
        try:
            store.append(run)
        except (ExportError, ModuleNotFoundError, OSError) as error:
            messages.print(f"[yellow]warning[/] not kept in the history: {escape(str(error))}", highlight=False)
