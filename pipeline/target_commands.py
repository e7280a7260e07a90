"""Commands about targets: `doctor` says what is missing on this machine, `emulator` sets the arm64 one up.

Nothing heavy is imported at the top.
"""

from __future__ import annotations

import platform
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bluelm.errors import InputError, UnavailableError
from pipeline.errors import leave
from pipeline.terminal import console, say

emulator = typer.Typer(help="The arm64 machine that artifacts run on without a phone.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(doctor)
    app.add_typer(emulator, name="emulator")


def doctor(
    target: Annotated[
        str | None, typer.Option(help="Only what this target needs; missing tools then end with code 5.")
    ] = None,
    runtime: Annotated[str | None, typer.Option(help="Only what this runtime needs.")] = None,
) -> None:
    """Check the versions of the compilers and runtimes here, and say what to install."""
    leave(lambda: examine_machine(target, runtime, console()))


def examine_machine(target: str | None, runtime: str | None, console: Console) -> int:
    """Print what was found.

    Raises:
        UnavailableError: a target or runtime was named and something that it needs is missing.
        InputError: unknown target or runtime.
    """
    from targets.tools import examine, tools

    wanted = _runtimes(target, runtime)
    found = [examine(tool) for tool in tools() if wanted is None or set(tool.runtimes) & wanted]
    if wanted is not None and not found:
        raise InputError(f"no runtime {runtime!r}", fix="see: bluelm-export targets")
    rows = Table(title=f"Python {platform.python_version()} on {platform.machine()}", title_justify="left")
    for heading in ("tool", "state", "here", "wanted", "for"):
        rows.add_column(heading)
    for one in found:
        style = {"ok": "green", "missing": "red", "other version": "yellow"}[one.state]
        rows.add_row(
            one.tool.name,
            f"[{style}]{one.state}[/]",
            one.found or "",
            one.tool.version or "any",
            one.tool.purpose,
        )
    console.print(rows)
    lacking = [one for one in found if one.state != "ok"]
    for one in lacking:
        console.print(f"{one.tool.name}: {one.tool.fix}", soft_wrap=True, markup=False, highlight=False)
    needed = [one.tool for one in lacking if one.state == "missing" and not one.tool.optional]
    if wanted is not None and needed:
        names = ", ".join(tool.name for tool in needed)
        raise UnavailableError(f"missing here: {names}", fix=needed[0].fix)
    return 0


def _runtimes(target: str | None, runtime: str | None) -> set[str] | None:
    """The runtimes that the options name; None: all."""
    from targets.registry import find
    from targets.socs import table

    if target is None:
        return None if runtime is None else {runtime}
    name = find(target, runtime=runtime).name
    return {runtime} if runtime else {table().targets[name].runtimes[0]}


@emulator.command("install")
def install_emulator() -> None:
    """Set the arm64 userland up, once: Debian packages and the aarch64 wheels, in the user's cache."""

    def work() -> int:
        from targets.emulator import install

        say(f"the arm64 userland is in {install()}")
        return 0

    leave(work)
