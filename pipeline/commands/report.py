"""Everything that a report is written as, and `bluelm-export report`, which writes it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import leave
from pipeline.terminal import say

if TYPE_CHECKING:
    from eval.report import Report


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(report)


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write into. Default: the run's.", show_default=False)
    ] = None,
) -> None:
    """Write report.html, junit.xml and summary.md of a finished run again, from its report.json."""

    def work() -> int:
        from pipeline.run.binding import open_run

        for path in write_all(open_run(run), out or run):
            say(path)
        return 0

    leave(work)


def write_all(found: Report, folder: Path) -> list[Path]:
    """Write the page, JUnit's XML and the summary into a folder; returns their paths."""
    from pipeline.report.ci_outputs import write_junit, write_summary
    from pipeline.report.page import write_page

    return [write_page(found, folder), write_junit(found, folder), write_summary(found, folder)]
