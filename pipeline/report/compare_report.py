"""What `compare` found: a table in the terminal, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.accuracy.compare import BlockErrors, Comparison
from eval.accuracy.metrics import Estimate
from pipeline.report.drawing import drawing


def show(reference: str, found: Sequence[Comparison], console: Console) -> None:
    """Print the tables."""
    table = Table(title=f"against {escape(reference)}", title_justify="left")
    for heading in ("", "mean KL", "largest KL", "top-1", "greedy tokens"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in found:
        name = escape(row.name)
        table.add_row(name, _estimate(row.kl), f"{row.largest_kl:.2e}", f"{row.top1.value:.2%}", _greedy(row))
    console.print(table)
    for row in found:
        if row.blocks is not None:
            _show_blocks(row.name, row.blocks, console)


def _show_blocks(name: str, blocks: BlockErrors, console: Console) -> None:
    how = "each given the same input" if blocks.local else "errors of earlier blocks included"
    console.print(f"\n[bold]{escape(name)}[/]: error of what each block adds, {how}", highlight=False)
    for index, (error, limit) in enumerate(zip(blocks.errors, blocks.expected, strict=True)):
        mark = f"  [red]outside[/] {limit:.2e}" if not error <= limit else ""
        console.print(f"  block {index:3d}  {error:.2e}{mark}", highlight=False)
    first = blocks.first_outside
    says = "every block lies" if first is None else f"[red]block {first} is the first that does not lie[/]"
    limits = f"{min(blocks.expected):.2e} to {max(blocks.expected):.2e}"
    console.print(f"  {says} within the expected {limits}", highlight=False, soft_wrap=True)
    if not blocks.same_twin:
        console.print(
            f"  [red]the build that shows these blocks answers otherwise than the artifact[/] (mean KL "
            f"{blocks.twin_kl:.1e}): what differs lies in the compiled file, which cannot be opened up",
            highlight=False,
        )


def _estimate(estimate: Estimate) -> str:
    error = "" if estimate.error is None else f" ± {estimate.error:.1e}"
    return f"{estimate.value:.2e}{error}"


def _greedy(row: Comparison) -> str:
    """How many prompts agree to the end, and the first difference that is no tie."""
    if not row.divergences:
        return "-"
    same = sum(d.at is None for d in row.divergences)
    ties = sum(d.tie for d in row.divergences)
    text = f"{same} of {len(row.divergences)} equal for {row.divergences[0].length}"
    if ties:
        text += f", {ties} apart at a tie"
    apart = [d for d in row.divergences if d.at is not None and not d.tie]
    if apart:
        first = min(apart, key=lambda d: d.at or 0)
        text += f"; prompt {first.prompt} differs at token {first.at} (margin {first.margin:.2g})"
    return text


def plot(reference: str, found: Sequence[Comparison], path: Path) -> None:
    """Errors of blocks where there are any, else mean KL, as a picture.

    Raises:
        InputError: it cannot write this kind of file.
    """
    shown = [(row.name, row.blocks) for row in found if row.blocks is not None]
    labels = ("block", "relative error of what it adds") if shown else ("mean KL, nats a token", "")
    with drawing(path, xlabel=labels[0], ylabel=labels[1]) as axes:
        for name, blocks in shown:
            line = axes.plot(blocks.errors, marker="o", label=name)[0]
            axes.plot(blocks.expected, color=line.get_color(), linestyle=":", linewidth=1)
        if shown:
            axes.set_yscale("log")
            axes.legend()
        else:
            axes.barh([row.name for row in found], [row.kl.value for row in found])
        axes.set_title(f"against {reference}")
