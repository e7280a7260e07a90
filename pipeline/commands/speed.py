"""Speed of a finished run: `measure` on a connected phone, `count` its instructions under qemu."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bluelm.errors import BudgetError, InputError
from pipeline.commands.history import HistoryFile
from pipeline.errors import leave
from pipeline.terminal import console, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.measurement import Measurement
    from eval.report import Report
    from export.artifacts.artifact import Artifact

RunFolder = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
Device = Annotated[str, typer.Option("--device", help="Serial; see: bluelm-export devices.")]
RunnerConfig = Annotated[
    Path | None,
    typer.Option(
        "--runner-config",
        help="YAML file with the paths of the runtime's own program, as targets/data/device_programs.yaml.",
        show_default=False,
    ),
]
AllowOtherSoc = Annotated[
    bool,
    typer.Option("--allow-other-soc", help="Measure on another chip than the target's; the report says so."),
]
CoolingLimit = Annotated[
    float, typer.Option("--cooling-limit", min=0, help="Seconds to wait at most for the phone to cool down.")
]
Hottest = Annotated[int, typer.Option("--hottest", min=0, max=6, help="Thermal status allowed: 0 none, 1 light ...")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(measure)
    app.command()(count)


def measure(
    run: RunFolder,
    device: Device,
    runner_config: RunnerConfig = None,
    repeats: Annotated[int, typer.Option(min=5, help="Measured repeats, after one to warm up.")] = 5,
    depth: Annotated[list[int] | None, typer.Option(help="Also decode with this many tokens in the cache.")] = None,
    allow_other_soc: AllowOtherSoc = False,
    hottest: Hottest = 0,
    cooling_limit: CoolingLimit = 600,
    history: HistoryFile = None,
) -> None:
    """Measure a finished run's speed on a phone, and compare it with the budget's speed limit.

    Pushes the artifact, runs the runtime's own benchmark program there, reads its figures, cleans up. Every figure is
    a median with its interval; a limit is compared with the interval's lower end.
    """

    def work() -> int:

        from eval.speed.device_speed import Protocol
        from pipeline.progress import show_progress
        from pipeline.run.binding import open_run
        from pipeline.run.phone import choose, measure_on
        from targets.registry import find

        report = open_run(run)
        artifact = phone_artifact(run, report)
        soc = find(report.target.split()[0], artifact.soc).soc
        if allow_other_soc and soc.dram_gb_s is None:
            fix = "omit --allow-other-soc"
            raise InputError(f"--allow-other-soc would change nothing: {soc.name} stands for any chip", fix=fix)
        phone = choose(device, artifact.format, soc, runner_config, allow_other_soc)
        protocol = Protocol(repeats=repeats, hottest=hottest, cooling_limit_s=cooling_limit)
        logs = run / "device" / device.replace(":", "_")
        with show_progress(console(error=True)) as progress:
            figures = measure_on(phone, artifact, logs, progress, protocol, depth or ())
        return _judge(report, figures, history)

    leave(work)


def phone_artifact(run: Path, report: Report, subjects: Sequence[str] = ("npu", "cpu")) -> Artifact:
    """The first artifact of a run that is there of these; by default what goes onto the phone.

    Raises:
        InputError: it has none of them.
    """
    from export.artifacts.artifact import Artifact

    for subject in subjects:
        if subject in report.artifacts:
            return Artifact.open(run / report.artifacts[subject].folder)
    raise InputError(f"this run has no artifact for {' or '.join(subjects)}", where=run, fix="run it again")


def _judge(report: Report, figures: Sequence[Measurement], history: Path | None) -> int:
    """Print the figures, append them to the history, hold the run's own speed limit against them."""
    from eval.budget.budget import judge
    from eval.budget.limits import Budget
    from eval.history import History, KeptRun

    for m in figures:
        say(f"{m.name}: {m.value:,.5g} {m.unit}, {m.how} by {m.by} ({m.note})")
    limit = Budget.model_validate(report.budget).min_decode_tokens_per_s
    passed = True
    if limit is not None:
        verdict = judge(Budget(min_decode_tokens_per_s=limit), figures, ())
        passed = verdict.passed
        for check in verdict.checks:
            say(f"{'ok  ' if check.passed else 'FAIL'} {check}")
    facts = {"configuration": report.configuration, "versions": report.versions}
    number = History(history).append(KeptRun(report.title, report.target, passed, tuple(figures), facts))
    say(f"run {number} of the history")
    return 0 if passed else BudgetError.exit_code


def count(
    run: RunFolder,
    depth: Annotated[int, typer.Option(min=0, help="Tokens in the cache at decode. 0: one chunk.")] = 0,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="Share of instructions that may be added to the accepted run's."),
    ] = 0.005,
    history: HistoryFile = None,
) -> None:
    """Count the CPU artifact's instructions a token under qemu; compare with the last accepted run.

    A regression check that no load of the machine disturbs: exit code 3 if either count grew by more than the
    tolerance.
    """

    def work() -> int:
        from eval.history import History
        from eval.speed.emulated import gate
        from pipeline.run.binding import open_run
        from targets.emulator import count as qemu_count

        report = open_run(run)
        artifact = phone_artifact(run, report, ("cpu",))
        counts = qemu_count.count(artifact, depth)
        title = f"{report.title} (instructions)"
        compared, passed = gate(title, report.target, counts, History(history), tolerance)
        for line in compared:
            say(f"{'ok  ' if line.passed else 'FAIL'} {line}")
        say(f"counted by {counts.tools}; logits within {counts.relative_error:.1e} of this machine's")
        if not passed:
            again = shlex.join(["bluelm-export", "history", "--title", title])
            say(f"if that is wanted, accept the run: {again}, then --accept NUMBER")
        return 0 if passed else BudgetError.exit_code

    leave(work)
