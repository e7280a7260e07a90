"""The command `targets`: targets, runtimes and chips as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from targets.registry import runtimes_of
from targets.socs import table


def show_targets(console: Console) -> None:
    """Print every target with its runtimes and its chips, the default first."""
    rows = Table(title="Targets (the first runtime and the first chip are the defaults)", title_justify="left")
    for heading in ("--target", "--runtime", "--soc"):  # to be typed: never cut
        rows.add_column(heading, no_wrap=True, overflow="fold")
    rows.add_column("chip")
    rows.add_column("GB/s", justify="right")
    for name, target in table().targets.items():
        chips = sorted(
            (soc for soc in table().socs if soc.vendor == target.vendor), key=lambda soc: soc.id != target.soc
        )
        for index, soc in enumerate(chips):
            first = (name, "\n".join(runtimes_of(name))) if index == 0 else ("", "")
            bandwidth = "" if soc.dram_gb_s is None else f"{soc.dram_gb_s:.1f}"
            rows.add_row(*first, soc.id.lower(), soc.name, bandwidth, end_section=index == len(chips) - 1)
    console.print(rows)
