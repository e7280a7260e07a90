"""Tokens/s on a phone: push, cool down, warm up, repeat, read, pull the logs, clean up."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from bluelm.errors import TargetError, UnavailableError
from bluelm.system.files import write_text
from bluelm.system.progress import Progress, Silent
from eval.measurement import Measurement
from eval.speed.repeats import AT_LEAST, Repeats
from targets.phones.phone import Bench, Phone, Thermal
from targets.phones.programs import DeviceProgram, Figures, in_turn, read_figures

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Call:
    """One measured call of the program.

    Attributes:
        phase: what it times. depth: tokens already in the cache. tokens: how many one step handles.
        model: local file or folder of the graph; a folder is pushed whole, and `entry` named in it.
        values: stand-ins for further names in the program's command line.
        further: model and entry of the model's other parts; they run one behind the other, and their times add up.
    """

    phase: Phase
    depth: int
    tokens: int
    model: Path
    entry: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    further: tuple[tuple[Path, str], ...] = ()

    @property
    def parts(self) -> tuple[Call, ...]:
        """A call of each part."""
        first = replace(self, further=())
        return (first, *(replace(first, model=model, entry=entry) for model, entry in self.further))


@dataclass(frozen=True)
class Protocol:
    """How carefully: repeats that count, the hottest status allowed (0 none), seconds to cool at most."""

    repeats: int = AT_LEAST
    hottest: int = 0
    cooling_limit_s: float = 600
    look_again_s: float = 10
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


def check_chip(phone: Phone, names: Sequence[str], *, allow_other: bool) -> str:
    """A note for the report: "" where the phone has the target's chip.

    Raises:
        TargetError: another chip, and that was not asked for.
    """
    wanted = {"".join(name.lower().split()) for name in names}
    if "".join(phone.soc.lower().split()) in wanted:
        return ""
    found = f"the device's chip is {phone.soc or 'not told'}, the target's is {names[0]}"
    if not allow_other:
        fix = "choose the target of this chip, or pass --allow-other-soc to measure all the same"
        raise TargetError(found, where=f"{phone.model} {phone.serial}", fix=fix)
    return f"ANOTHER CHIP: {found}"


def cool(bench: Bench, protocol: Protocol) -> tuple[Thermal, float]:
    """Wait until the device's thermal status allows a run.

    Returns:
        its state, and how many seconds were waited.

    Raises:
        UnavailableError: still too hot at the limit: no figure.
    """
    started = protocol.clock()
    while True:
        state = bench.thermal()
        waited = protocol.clock() - started
        if state.status is None or state.status <= protocol.hottest:
            return state, waited
        if waited >= protocol.cooling_limit_s:
            fix = "let it rest in a cool place, or raise --cooling-limit"
            raise UnavailableError(f"still too hot after {waited:.0f} s: {state}", where=bench.serial, fix=fix)
        protocol.sleep(protocol.look_again_s)


def measure(
    bench: Bench,
    program: DeviceProgram,
    calls: Sequence[Call],
    logs: Path,
    *,
    protocol: Protocol | None = None,
    note: str = "",
    progress: Progress | None = None,
) -> list[Measurement]:
    """Run every call on the device, at least five times after a warm-up, and leave nothing behind there.

    Args:
        logs: a folder that gets the program's output of each run.
        note: goes into every figure's note.

    Raises:
        UnavailableError: no program, disconnected, disk full, crashed, garbage, too hot: no figure.
    """
    protocol = protocol or Protocol()
    folder = f"{program.remote_folder.rstrip('/')}/{bench.serial.replace(':', '_').replace('/', '_')}"
    files = program.files()
    try:
        bench.prepare(folder)
        _push_all(bench, files, folder, 0o755, progress or Silent())
        figures = []
        for model in dict.fromkeys(part.model for call in calls for part in call.parts):
            _push_all(bench, [model], folder, 0o644, progress or Silent())
        for call in calls:
            figures += _measure_call(bench, program, call, folder, logs, protocol, note, progress or Silent())
        return figures
    finally:
        bench.clean(folder)


def _push_all(bench: Bench, paths: Sequence[Path], folder: str, mode: int, progress: Progress) -> None:
    """Push files and folders (whole, subfolders too), with their modes."""
    files: list[tuple[Path, str]] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files += [(p, f"{folder}/{p.relative_to(path.parent).as_posix()}") for p in inside]
    with progress.task("push", total=sum(local.stat().st_size for local, _ in files)) as task:
        for local, remote in files:
            bench.push(local, remote, mode, lambda sent: task.advance(sent, note=local.name))  # noqa: B023


def _measure_call(
    bench: Bench,
    program: DeviceProgram,
    call: Call,
    folder: str,
    logs: Path,
    protocol: Protocol,
    note: str,
    progress: Progress,
) -> list[Measurement]:
    before, waited = cool(bench, protocol)
    runs = []
    with progress.task(f"{call.phase} on {bench.serial}", total=protocol.repeats + 1) as task:
        for turn in range(protocol.repeats + 1):  # the first warms up
            if turn:
                cool(bench, protocol)
            told = []
            for index, part in enumerate(call.parts):
                name = f"{call.phase}-{call.depth}-{turn}" + (f"-part{index + 1}" if call.further else "")
                text = _run(bench, program, part, folder, logs / f"{name}.log")
                told.append(read_figures(program, call.phase, text, call.tokens))
            runs.append(in_turn(told))
            task.advance()
    heat = f"thermal before: {before} (cooled {waited:.0f} s), after: {bench.thermal()}"
    parts = f"{len(call.parts)} parts, each timed alone, their times added" if call.further else ""
    return _figures(runs[1:], call, "; ".join(part for part in (parts, heat, note) if part))


def _command(program: DeviceProgram, call: Call, folder: str) -> tuple[list[str], dict[str, str]]:
    """The program's words and its environment, every stand-in filled in."""
    template = (program.prefill if call.phase == "prefill" else program.decode) or program.decode
    binary = f"{folder}/{program.binary.name}" if program.binary else program.bundle
    model = f"{folder}/{call.model.name}" + (f"/{call.entry}" if call.entry else "")
    values = {"folder": folder, "binary": binary, "model": model}
    values["tokenizer"] = f"{folder}/{call.model.name}/tokenizer.model"
    values |= call.values
    try:
        words = [word.format(**values) for word in shlex.split(template)]
        return words, {name: value.format(**values) for name, value in program.environment.items()}
    except (KeyError, IndexError, ValueError) as error:
        fix = f"known names: {', '.join(values)}"
        raise UnavailableError(f"the program's command line is wrong at {error}", where=template, fix=fix) from error


def _run(bench: Bench, program: DeviceProgram, call: Call, folder: str, log: Path) -> str:
    """What the program wrote. A crash (128 + signal) or any other failure is told with its last words."""
    words, environment = _command(program, call, folder)
    result = bench.run(words, folder, environment, program.silence_limit_s)
    told = f"{result.stdout}\n--- stderr\n{result.stderr}\n--- exit {result.exit_code}\n"
    write_text(log, f"$ {shlex.join(words)}\n{told}")
    if result.exit_code != 0:
        said = (result.stderr.strip() or result.stdout.strip())[-300:] or "nothing"
        how = f"was killed by signal {result.exit_code - 128}" if result.exit_code > 128 else "failed"
        problem = f"{program.says} {how} (exit {result.exit_code}) on the device; it said: {said}"
        raise UnavailableError(problem, where=log, fix="run it by hand on the device")
    return result.stdout + "\n" + result.stderr


def _figures(runs: Sequence[Figures], call: Call, note: str) -> list[Measurement]:
    """Figures that every run told, as medians with intervals; memory as the largest of all runs."""
    suffix = f"@{call.depth}" if call.depth else ""
    named = (
        ("prefill_tokens_per_s", "tokens/s", [r.prefill_tokens_s for r in runs]),
        ("first_token_s", "s", [r.first_token_s for r in runs]),
        (f"decode_tokens_per_s{suffix}", "tokens/s", [r.decode_tokens_s for r in runs]),
    )
    found = []
    for name, unit, values in named:
        told = [v for v in values if v is not None]
        if len(told) == len(runs):
            found.append(Repeats(tuple(told)).measurement(name, unit, "measured", "soc", note))
    peaks = [r.peak_bytes for r in runs if r.peak_bytes]
    if peaks:
        name = f"{call.phase}_peak_memory_bytes{suffix}"
        found.append(Measurement(name, max(peaks), "bytes", "measured", None, len(peaks), note, "soc"))
    return found
