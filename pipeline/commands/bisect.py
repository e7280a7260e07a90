"""The command `bisect`: the first place where a run's artifact differs from its model, and the cause."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bluelm.errors import InputError
from pipeline.errors import leave
from pipeline.terminal import say

if TYPE_CHECKING:
    from eval.accuracy.bisect import FirstFault

TOKENS = 64


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(bisect)


def bisect(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, e.g. dist/bluelm-demo-gptq-w4-g32-sm8650.")],
    artifact: Annotated[
        str | None, typer.Option(help="npu or cpu. Default: all of the run.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The float checkpoint. Default: where the run found it.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the findings to this file.", show_default=False)
    ] = None,
) -> None:
    """Name the first block and tensor where an artifact differs from its model, and the cause: weights,
    activations or the runtime."""

    def work() -> int:
        from typing import cast

        from bluelm.system.files import json_text, write_text
        from eval.files.origin import origin
        from eval.report import Report
        from export.artifacts.artifact import Artifact
        from pipeline.run.layout import QUANTIZED
        from targets.runtime import Place

        report = Report.open(run)
        unknown = artifact is not None and artifact not in report.artifacts
        if unknown:
            fix = f"its artifacts: {', '.join(report.artifacts)}"
            raise InputError(f"this run has no artifact {artifact!r}", where=run, fix=fix)
        found: dict[str, FirstFault | None] = {}
        for name, built in report.artifacts.items():
            if artifact in (None, name):
                place = cast(Place, built.on)
                found_by = origin(Artifact.open(run / built.folder), place)
                say(f"{name}: {built.folder} on {place}, {TOKENS} tokens, {found_by.how} by {found_by.by}")
                folder = model or Path(report.configuration.get("model", ""))
                with tempfile.TemporaryDirectory(prefix="bluelm-bisect-") as scratch:
                    found[name] = _bisect(run / built.folder, built.on, run / QUANTIZED, folder, Path(scratch))
                say(f"  {found[name] or 'nothing is beyond what is expected'}")
        if json_file is not None:
            shown = {name: None if one is None else vars(one) for name, one in found.items()}
            write_text(json_file, json_text(shown))
        return 0

    leave(work)


def _bisect(folder: Path, on: str, quantized: Path, model: Path, scratch: Path) -> FirstFault | None:
    from typing import cast

    from bluelm.checkpoint import Checkpoint
    from compress.checkpoint.store import QuantizedCheckpoint
    from eval import heldout
    from export.artifacts.artifact import Artifact
    from pipeline.judge.bisecting import Bisection
    from pipeline.run import provenance
    from targets.runtime import Place

    opened = Artifact.open(folder)
    checkpoint = None
    if (model / "config.json").is_file():
        provenance.check(model)
        checkpoint = Checkpoint.open(model)
    else:
        say("  the float checkpoint is not there: what rounding the weights costs is not looked at (--model)")
    held_out = heldout.load([], (checkpoint or QuantizedCheckpoint.open(quantized)).tokenizer())
    tokens = held_out.windows[0].tokens.tolist()[: min(TOKENS, opened.chunk)]
    bisection = Bisection(opened, cast(Place, on), QuantizedCheckpoint.open(quantized), checkpoint, tokens, scratch)
    return bisection.find()
