"""The command `evaluate`: judges finished artifacts, whoever made them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import leave
from pipeline.options import options as o
from pipeline.options.effects import given_options
from pipeline.terminal import console

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.judge.evaluating import Asked


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(evaluate)


def evaluate(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="Folder of an artifact, or of a run: then each of its artifacts.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="The float checkpoint to compare with. Default: the run's own.", show_default=False),
    ] = None,
    quantized: Annotated[
        Path | None,
        typer.Option(
            help="The quantized checkpoint whose codes the artifact should hold. Default: the run's own.",
            show_default=False,
        ),
    ] = None,
    adapter: o.Adapter = None,
    target: Annotated[
        str | None, typer.Option(help="What the artifact is for. Default: what it says itself.", show_default=False)
    ] = None,
    soc: Annotated[str | None, typer.Option(help="The phone's chip.", show_default=False)] = None,
    budget: o.BudgetFile = None,
    eval_text: o.EvalText = None,
    eval_tokens: Annotated[
        int | None, typer.Option(min=256, help="Tokens of text to judge on.", show_default="the run's, or 16384")
    ] = None,
    npu_tokens: Annotated[
        int | None, typer.Option(min=256, help="Of these, for an NPU's simulator.", show_default="the run's, or 4096")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder to write the report into. Default: the run's; none for an artifact."),
    ] = None,
) -> None:
    """Judge an existing artifact against a budget, on held-out text and by its files; nothing is built.

    A run's report is replaced by the new one; the old one is kept in `previous`.
    """

    def work() -> int:

        from bluelm.adapters import parse_adapter
        from pipeline.judge.evaluating import Asked

        asked = Asked(
            path, reference, quantized, tuple(map(parse_adapter, adapter or ())) if adapter else None, target, soc,
            budget, tuple(eval_text or ()), eval_tokens, npu_tokens, report, given_options(context),
        )  # fmt: skip
        return _judge(asked, console(), console(error=True))

    leave(work)


def _judge(asked: Asked, output: Console, messages: Console) -> int:
    from bluelm.errors import BudgetError
    from eval.report import show
    from pipeline.judge import evaluating
    from pipeline.progress import show_progress
    from pipeline.report.ci_outputs import announce
    from pipeline.report.page import PAGE

    with messages.status("reading artifacts, checkpoint and text"):
        opened = evaluating.open_all(asked)
    for warning in opened.warnings:
        messages.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    with show_progress(messages) as progress:
        report = evaluating.judge_all(opened, progress)
    folder = evaluating.keep(opened, report)
    show(report, output)
    if folder is not None:
        output.print(f"\nReport: {folder / PAGE}, beside report.json", highlight=False, soft_wrap=True)
    announce(report)
    return 0 if report.passed else BudgetError.exit_code
