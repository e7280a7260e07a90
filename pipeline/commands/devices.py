"""Commands about speed without a run: `devices` lists what is connected, `estimate` needs no device at all.

Nothing heavy is imported at the top: `estimate` answers in under a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bluelm.errors import InputError, UnavailableError
from pipeline.errors import leave
from pipeline.options.effects import refuse_if
from pipeline.terminal import say

NOT_KNOWN = "not known"  # in place of a speed that nothing published speaks for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from eval.speed.speed_model import ChipSpeed, DecoderSizes, Interval, RuntimeClass, TokenCost
    from targets.phones.phone import Phone


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(devices)
    app.command()(estimate)


def devices(
    serial: Annotated[str | None, typer.Argument(help="Serial of one phone.", show_default=False)] = None,
) -> None:
    """List the phones that adb and devicectl see: chip, memory, system, NPU libraries, heat."""
    leave(lambda: show_devices(serial))


def show_devices(serial: str | None) -> int:
    """Print the list; nothing connected, or no tool to see with: exit code 5, and what to do."""
    found, missing = connected()
    if serial is not None:
        found = [phone for phone in found if phone.serial == serial]
    if not found:
        what = f"no device {serial!r} is connected" if serial else "no device is connected"
        raise UnavailableError(what, fix="; ".join(missing) or "connect a phone with USB debugging on")
    for line in device_lines(found):
        say(line)
    for text in missing:
        say(f"not asked: {text}")
    return 0


def connected() -> tuple[list[Phone], list[str]]:
    """Every device of both tools, and what could not be asked, with the reason."""
    from targets.phones import adb, devicectl, phone

    found: list[Phone] = []
    missing: list[str] = []
    for ask in (lambda: phone.phones(adb.Server()), devicectl.phones):
        try:
            found += ask()
        except UnavailableError as error:
            missing.append(f"{error.problem}: {error.fix}" if error.fix else error.problem)
    return found, missing


def device_lines(phones: Sequence[Phone]) -> Iterator[str]:
    """A table with one line a device."""
    head = ("serial", "state", "model", "chip", "memory", "system", "NPU libraries", "thermal state")
    rows = [
        (
            p.serial,
            p.state,
            p.model,
            p.soc or "?",
            f"{p.memory / 2**30:.1f} GiB" if p.memory else "?",
            p.system,
            ", ".join(p.runtimes) or "none found",
            str(p.thermal),
        )
        for p in phones
    ]
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a plain table with columns as wide as they must be; rich would cost half a second."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, tuple("-" * w for w in widths), *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def estimate(
    command: typer.Context,
    soc: Annotated[list[str] | None, typer.Option(help="Chip; repeat for several. Default: the device table.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Model; repeat for several. Default: BlueLM 1B, 3B, 7B, 13B.")
    ] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Width of the weights. Default: 4 and 8.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 2048,
    on: Annotated[
        Literal["npu", "cpu", "gpu"] | None,
        typer.Option(
            help="Where it runs; npu is the Hexagon, the APU or the Neural Engine. Default: where the artifact's own "
            "runtime does; npu without one.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, for the first token.")] = 128,
    artifact: Annotated[
        Path | None, typer.Option(help="Take the work from a finished artifact's folder.", show_default=False)
    ] = None,
) -> None:
    """Estimate tokens/s from published figures, without a device or a checkpoint.

    Each figure comes with the interval that held 80 % of the published ones left out in the same way.
    """

    def work() -> int:
        for option in ("--model", "--bits", "--context"):
            refuse_if(artifact is not None, command, option, "the artifact's own counts")
        return show_estimates(soc, model, bits, context, on, prompt, artifact)

    leave(work)


def show_estimates(
    socs: Sequence[str] | None,
    models: Sequence[str] | None,
    bits: Sequence[int] | None,
    context: int,
    on: Literal["npu", "cpu", "gpu"] | None,
    prompt: int,
    artifact: Path | None = None,
) -> int:
    """Print a line for every chip, model and width."""
    from eval.speed.speed_model import BLUELM, SMALLEST, default_work, find_shape, find_soc
    from eval.speed.speed_model import socs as known_socs

    chosen_bits = bits or (4, 8)
    if any(not 1 <= b <= 16 for b in chosen_bits):
        raise InputError(f"--bits {max(chosen_bits)} is not a supported weight width", fix="give 1 to 16")
    listed = [soc for soc in known_socs().values() if soc.in_device_table]
    chips = [find_soc(name) for name in socs] if socs else listed
    head = ("chip", "model", "bits", "on", "GB a token", "decode tokens/s", "80 % interval")
    head = (*head, f"first of {prompt} s", "80 % interval")
    rows = []
    if artifact is not None:
        rows = _artifact_rows(artifact, chips, on, prompt)
    else:
        shapes: list[DecoderSizes] = [find_shape(name) for name in models or BLUELM]
        for chip in chips:
            kind = runtime_class(chip, on or "npu")
            for shape in shapes:
                for width in chosen_bits:
                    load = default_work(shape, width, kind, context)
                    small = shape.body_weights + shape.head_weights < SMALLEST
                    runtime = None if small else runtime_name(chip, kind)
                    rows.append(_line(chip, shape.model, f"{width}", load, kind, runtime, prompt))
    for line in table(head, rows):
        say(line)
    if any(row[5] == NOT_KNOWN for row in rows):
        say(f"\n{NOT_KNOWN}: nothing is published of models below {SMALLEST / 1e9:g} B parameters")
    say("\nFrom published figures of other models; error on rows left out: benchmarks/speed/speed_model.md")
    return 0


def runtime_class(chip: ChipSpeed, on: Literal["npu", "cpu", "gpu"]) -> RuntimeClass:
    """The class of published figures that speaks for it: the Neural Engine on Apple's chips."""
    apple = chip.neural_engine_gb_s is not None
    return "ane" if on == "npu" and apple else on


def runtime_name(chip: ChipSpeed, kind: RuntimeClass) -> str:
    """The runtime that our artifacts take there, as published figures name it; "" where they have none."""
    return "QNN" if kind == "npu" and chip.name.startswith("Snapdragon") else ""


def _artifact_rows(
    folder: Path, chips: Sequence[ChipSpeed], on: Literal["npu", "cpu", "gpu"] | None, prompt: int
) -> list[tuple[str, ...]]:
    """A line a chip, of the class that the artifact's own runtime is of unless another is named.

    Raises:
        InputError: no artifact. UnavailableError: nothing is published of the way it computes.
    """
    from eval.speed.estimate import find_artifact, not_known, work_of
    from eval.speed.speed_model import SMALLEST
    from export.formats import Without

    artifact, name = find_artifact(folder)
    speed = artifact.record.speed
    known = None if isinstance(speed, Without) else (speed.unit, speed.published_as)
    small = artifact.parameters < SMALLEST
    if on is None and known is None and not small:
        raise UnavailableError(f"not estimated: {not_known(artifact)}", where=folder, fix="measure it on a phone")
    kind, runtime = known if on is None and known else (None, "")
    rows = []
    for chip in chips:
        own = kind or runtime_class(chip, on or "cpu")
        told = None if small else runtime if kind else runtime_name(chip, own)
        rows.append(_line(chip, name, f"{artifact.bits_per_weight:.2f}", work_of(artifact), own, told, prompt))
    return rows


def _line(
    chip: ChipSpeed, name: str, width: str, load: TokenCost, kind: RuntimeClass, runtime: str | None, prompt: int
) -> tuple[str, ...]:
    """`runtime`: as published figures name it; None: the model is too small for any of them to speak for it."""
    from eval.speed.speed_model import estimate as ask

    size = (load.weight_bytes + load.cache_bytes) / 1e9
    about = (chip.name, name, width, kind, f"{size:.2f}")
    if runtime is None:
        return (*about, NOT_KNOWN, "-", "-", "-")
    decode = ask("decode", load, chip, kind, runtime=runtime)
    try:
        prefill = ask("prefill", load, chip, kind, runtime=runtime)
        first = _seconds(prefill, prompt)
    except UnavailableError:  # nobody published a prefill speed there
        first = ("-", "-")
    return (*about, f"{decode.value:.1f}", f"{decode.low:.1f} to {decode.high:.1f}", *first)


def _seconds(rate: Interval, prompt: int) -> tuple[str, str]:
    return f"{prompt / rate.value:.2f}", f"{prompt / rate.high:.2f} to {prompt / rate.low:.2f}"
