"""`bluelm-export history`: lists runs, and lists and plots one figure over them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bluelm.errors import InputError
from pipeline.commands.devices import table
from pipeline.errors import leave
from pipeline.options.effects import refuse_if
from pipeline.terminal import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.history import KeptRun
    from eval.measurement import Measurement

BARS = "▁▂▃▄▅▆▇█"

HistoryFile = Annotated[
    Path | None,
    typer.Option("--history", help="File of the history. Default: in the user's data folder.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(history)


def history(
    context: typer.Context,
    metric: Annotated[
        str | None, typer.Option(help="List this figure over the runs, e.g. decode_tokens_per_s.")
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="Subject of the figure: npu, cpu, host, soc, files ... Default: any.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="List only runs with this title.")] = None,
    last: Annotated[int, typer.Option(min=1, help="List only this many of the newest runs.")] = 50,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the figure into this .png, .svg or .pdf.", show_default=False)
    ] = None,
    accept: Annotated[int | None, typer.Option(help="Compare later runs with this one, by its number.")] = None,
    reject: Annotated[int | None, typer.Option(help="Compare no run with this one, by its number.")] = None,
    path: HistoryFile = None,
) -> None:
    """List earlier runs, or one figure over them; every run is kept on this machine."""

    def work() -> int:
        refuse_if(metric is None, context, "--subject", "no figure is listed", "add --metric NAME")
        return show(metric, subject, title, last, plot, accept, reject, path)

    leave(work)


def show(
    metric: str | None,
    subject: str | None,
    title: str | None,
    last: int,
    plot: Path | None,
    accept: int | None,
    reject: int | None,
    path: Path | None,
) -> int:
    """Do what the options say and print it."""
    from eval.history import History

    store = History(path)
    for number, accepted in ((accept, True), (reject, False)):
        if number is not None:
            store.accept(number, accepted)
    if plot is not None and metric is None:
        raise InputError("--plot draws one figure over the runs", fix="add --metric NAME")
    runs = store.runs(title=title, last=last)
    if not runs:
        say(f"no runs in {store.path}")
        return 0
    lines = _run_lines(runs) if metric is None else _metric_lines(runs, metric, subject, plot)
    for line in lines:
        say(line)
    return 0


def _run_lines(runs: Sequence[KeptRun]) -> list[str]:
    head = ("run", "time (UTC)", "verdict", "compared with", "target", "title")
    rows = [
        (
            str(run.id),
            run.time[:19],
            "passed" if run.passed else "FAILED",
            "yes" if run.accepted else "no",
            run.target,
            run.title,
        )
        for run in runs
    ]
    return list(table(head, rows))


def _metric_lines(runs: Sequence[KeptRun], metric: str, subject: str | None, plot: Path | None) -> list[str]:
    """One line a run that has the figure, a line of bars a title and, where asked for, a drawing."""
    found = [(run, figure) for run in runs if (figure := run.figure(metric, subject)) is not None]
    if not found:
        from eval.history import names

        known = ", ".join(sorted({name for name, _ in names(runs)}))
        raise InputError(f"no run has a figure {metric!r}", fix=f"the runs have: {known}")
    head = ("run", "time (UTC)", "value", "unit", "interval", "how", "of", "title")
    lines = list(table(head, [_metric_row(run, figure) for run, figure in found]))
    for title in dict.fromkeys(run.title for run, _ in found):
        values = [figure.value for run, figure in found if run.title == title]
        lines.append(f"{bars(values)}  {min(values):.4g} to {max(values):.4g}  {title}")
    if plot is not None:
        draw(found, metric, plot)
        lines.append(f"drawn into {plot}")
    return lines


def _metric_row(run: KeptRun, figure: Measurement) -> tuple[str, ...]:
    interval = "" if figure.low is None or figure.high is None else f"{figure.low:.5g} to {figure.high:.5g}"
    value = f"{figure.value:.6g}"
    return (str(run.id), run.time[:19], value, figure.unit, interval, figure.how, figure.subject, run.title)


def bars(values: Sequence[float]) -> str:
    """One character a value, its height between the smallest and the largest; ? where it is no number."""
    finite = [v for v in values if abs(v) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((v - low) / step)] if abs(v) < float("inf") else "?" for v in values)


def draw(found: Sequence[tuple[KeptRun, Measurement]], metric: str, path: Path) -> None:
    """A line a title over the runs' numbers, with intervals where there are any.

    Raises:
        InputError: a kind of file that cannot be drawn.
    """
    from pipeline.report.drawing import drawing

    with drawing(path, xlabel="run", ylabel=f"{metric} [{found[0][1].unit}]") as axes:
        for title in dict.fromkeys(run.title for run, _ in found):
            own = [(run.id or 0, m) for run, m in found if run.title == title and abs(m.value) < float("inf")]
            below = [m.value - m.low if m.low is not None else 0.0 for _, m in own]
            above = [m.high - m.value if m.high is not None else 0.0 for _, m in own]
            numbers, values = [number for number, _ in own], [m.value for _, m in own]
            axes.errorbar(numbers, values, yerr=(below, above), marker="o", capsize=3, label=title)
        axes.legend()
