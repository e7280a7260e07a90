"""A connected phone for a run: found before hours are spent, measured when the artifact is there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bluelm.errors import UnavailableError
from bluelm.system.progress import Progress
from eval.files.origin import Answered
from eval.measurement import Measurement
from eval.speed import device_speed
from eval.speed.device_speed import Call, Protocol
from export.artifacts.artifact import Artifact
from pipeline.run.plan import Plan
from targets.emulator.feeds import graph_paths, perf_test_folder, prompt_tokens, record, still
from targets.phones import devicectl
from targets.phones.adb import Server
from targets.phones.phone import AndroidBench, Bench, Phone, ask
from targets.phones.programs import DeviceProgram, load_program
from targets.socs import Soc


@dataclass(frozen=True)
class ChosenPhone:
    """A phone that answers, the runtime's program for it, and what the report must say (e.g. another chip)."""

    phone: Phone
    bench: Bench
    program: DeviceProgram
    note: str


def choose(serial: str, runtime: str, soc: Soc, runner_config: Path | None, allow_other: bool) -> ChosenPhone:
    """Find the phone, check its chip and the benchmark program's files.

    Raises:
        UnavailableError: no such device or program. TargetError: another chip, and that was not asked for.
    """
    program = load_program(runtime, runner_config)
    program.files()
    phone, bench = _open(serial, program)
    note = ""
    if soc.dram_gb_s is not None:  # a target without a chip of its own runs on any
        note = device_speed.check_chip(phone, (soc.name, soc.id, *soc.aliases), allow_other=allow_other)
    device = f"{phone.model} {phone.serial}, {phone.soc}, {phone.system}"
    return ChosenPhone(phone, bench, program, "; ".join(part for part in (note, device) if part))


def find_phone(plan: Plan) -> ChosenPhone | None:
    """The phone that a run names, if any; the program's configuration is read in any case. Raises as `choose` does."""
    request, target = plan.request, plan.target
    if request.device is None:
        if request.runner_config is not None:
            load_program(target.runtime, request.runner_config)
        return None
    return choose(request.device, target.runtime, target.soc, request.runner_config, request.allow_other_soc)


def measure_on(
    chosen: ChosenPhone,
    artifact: Artifact,
    logs: Path,
    progress: Progress,
    protocol: Protocol | None = None,
    depths: Sequence[int] = (),
) -> list[Measurement]:
    """Figures of the artifact on the phone; the program's words are kept in `logs`.

    Raises:
        UnavailableError: too hot, disconnected, a crash, nothing that can be read: no figure.
    """
    with tempfile.TemporaryDirectory(prefix="bluelm-export-") as folder:
        calls = make_calls(artifact, chosen.program, Path(folder), depths)
        found = device_speed.measure(
            chosen.bench, chosen.program, calls, logs, protocol=protocol, note=chosen.note, progress=progress
        )
    phone = chosen.phone
    device = f"{phone.model} {phone.serial}"
    by = f"{chosen.program.says} on {f'the Android emulator {device}' if phone.emulated else device}"
    return Answered("emulated" if phone.emulated else "measured", by).mark(found)


def _open(serial: str, program: DeviceProgram) -> tuple[Phone, Bench]:
    """The phone and a bench on it: an Apple device if the program is an app, else over adb."""
    if program.bundle:
        found = {phone.serial: phone for phone in devicectl.phones()}
        if serial not in found:
            known = ", ".join(found) or "none"
            raise UnavailableError(f"no device {serial!r} is connected", fix=f"connected: {known}")
        return found[serial], devicectl.AppleBench(serial, program.bundle)
    device = Server().device(serial)
    return ask(device), AndroidBench(device)


def make_calls(artifact: Artifact, program: DeviceProgram, folder: Path, depths: Sequence[int]) -> list[Call]:
    """One call for prefill and one for decode at each depth.

    onnxruntime_perf_test wants the graphs' inputs beside them: they are recorded here, behind real tokens, but for
    compiled graphs. Other programs take the artifact's folder and a prompt as long as the depth.
    """
    values = {"decode_tokens": "32"}
    if program.says != "onnxruntime_perf_test":
        prompts = {0: artifact.chunk, **{depth: depth for depth in depths}}
        return [
            Call("decode", depth, 1, artifact.folder, values={**values, "prompt": "a " * length})
            for depth, length in prompts.items()
        ]
    calls = []
    for depth in (0, *depths):
        recorded = {} if artifact.record.compiled_from else record(artifact, depth)[0]
        for graph in ("prefill", "decode") if depth == 0 else ("decode",):
            places: list[tuple[Path, str]] = []
            for path in graph_paths(artifact, graph):
                feeds = recorded.get(graph) or still(path)
                place = folder / f"{graph}-{depth}-part{len(places) + 1}"
                places.append((perf_test_folder(artifact, path, feeds, place), path.name))
            tokens = prompt_tokens(artifact) if graph == "prefill" else 1
            calls.append(Call(graph, depth, tokens, *places[0], values, tuple(places[1:])))
    return calls
