"""Commands about targets: `doctor` says what is missing on this machine, `emulator` sets the arm64 one up.

Nothing heavy is imported at the top.
"""

from __future__ import annotations

import platform
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bluelm.errors import UnavailableError
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
    setup: Annotated[
        str | None,
        typer.Option(metavar="RUNNER", help="First install this runner, e.g. llama.cpp, in an environment of its own."),
    ] = None,
) -> None:
    """Check the versions of the compilers and runtimes here, and say what to install."""

    def work() -> int:
        if setup is not None:
            _set_up(setup)
        return examine_machine(target, runtime, console())

    leave(work)


def _set_up(runner: str) -> None:
    from pipeline.progress import working
    from targets.runners.environment import set_up

    with working(console(error=True), f"install {runner}"):
        set_up(runner)


def examine_machine(target: str | None, runtime: str | None, console: Console) -> int:
    """Print what was found.

    Raises:
        UnavailableError: a target or runtime was named and something that it needs is missing.
        InputError: unknown target or runtime.
    """
    from targets.tools import examine, tools

    wanted, optional = _tools_of(target, runtime)
    found = [examine(tool) for tool in tools() if wanted is None or tool.name in wanted]
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
    _tell_of_runners(console)
    needed = [one.tool for one in lacking if one.state == "missing" and one.tool.name not in optional]
    if wanted is not None and needed:
        names = ", ".join(tool.name for tool in needed)
        raise UnavailableError(f"missing here: {names}", fix=needed[0].fix)
    return 0


def _tell_of_runners(console: Console) -> None:
    """Those in environments of their own, and how to get those that are not here."""
    from targets.runners.environment import folder, quoted, runners, site
    from targets.runners.runner import named, version_of

    missing = [quoted(name) for name, runner in runners().items() if version_of(runner) is None]
    for runner in runners().values():
        if site(runner) is not None:
            told = f"{named(runner)} runs in an environment of its own: {folder(runner)}"
            console.print(told, soft_wrap=True, markup=False, highlight=False)
    if missing:
        told = f"in an environment of its own: bluelm-export doctor --setup {' | '.join(missing)}"
        console.print(told, soft_wrap=True, markup=False, highlight=False)


def _tools_of(target: str | None, runtime: str | None) -> tuple[set[str] | None, set[str]]:
    """Names of the tools of the runtime that the options name (None: all), and those that it lowers without."""
    from export.formats import record
    from targets.registry import find

    if target is not None:
        runtime = find(target, runtime=runtime).runtime
    if runtime is None:
        return None, set()
    found = record(runtime)
    needed = {*found.tools, *(record(found.compiled_from).tools if found.compiled_from else ())}
    return {*needed, *found.optional_tools}, {*found.optional_tools} - needed


@emulator.command("install")
def install_emulator() -> None:
    """Set up the arm64 userland once: Debian packages and the aarch64 wheels, in the user's cache."""

    def work() -> int:
        from targets.emulator.guest import install

        say(f"the arm64 userland is in {install()}")
        return 0

    leave(work)
