"""A phone's properties: chip, memory, system, NPU libraries, temperature."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bluelm.errors import UnavailableError
from targets.phones.adb import Device, Server, ShellResult

# android.os.PowerManager.THERMAL_STATUS_*
THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
NPU_LIBRARIES = {
    "QNN": "/vendor/lib64/libQnnHtp.so",
    "FastRPC": "/vendor/lib64/libcdsprpc.so",
    "NeuroPilot": "/vendor/lib64/libneuron_adapter_mgvi.so",
    "NeuroPilot (system)": "/system_ext/lib64/libneuronusdk_adapter.mtk.so",
    "NNAPI": "/apex/com.android.neuralnetworks/lib64/libneuralnetworks.so",
}


@dataclass(frozen=True)
class Thermal:
    """How hot a device is: the system's status (0 to 6; None: it does not say), degrees Celsius by sensor."""

    status: int | None
    temperatures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        name = "unknown" if self.status is None else THERMAL_STATUS[self.status]
        hottest = max(self.temperatures.values(), default=None)
        return name if hottest is None else f"{name}, hottest sensor {hottest:.0f} °C"


@dataclass(frozen=True)
class Phone:
    """A device as `bluelm-export devices` lists it; memory in bytes, None where it does not say."""

    serial: str
    state: str
    model: str = ""
    soc: str = ""
    memory: int | None = None
    system: str = ""
    runtimes: tuple[str, ...] = ()
    thermal: Thermal = Thermal(None)
    emulated: bool = False
    """Whether it is Android's emulator, which says so itself."""


class Bench(Protocol):
    """A device that a benchmark program can run on; paths below `folder` are remote."""

    serial: str

    def prepare(self, folder: str) -> None:
        """Make the folder, empty."""
        ...

    def push(self, local: Path, remote: str, mode: int, advance: Callable[[int], None]) -> None: ...

    def run(
        self, words: Sequence[str], folder: str, environment: Mapping[str, str], silence_limit_s: float
    ) -> ShellResult:
        """Run a program with arguments in the folder."""
        ...

    def thermal(self) -> Thermal: ...

    def clean(self, folder: str) -> None:
        """Remove the folder, as far as the device still answers."""
        ...


class AndroidBench:
    """An Android device over adb."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.serial = device.serial

    def prepare(self, folder: str) -> None:
        self.device.check(f"rm -rf {shlex.quote(folder)} && mkdir -p {shlex.quote(folder)}")

    def push(self, local: Path, remote: str, mode: int, advance: Callable[[int], None]) -> None:
        self.device.check(f"mkdir -p {shlex.quote(remote.rpartition('/')[0])}")
        self.device.push(local, remote, mode, advance)

    def run(
        self, words: Sequence[str], folder: str, environment: Mapping[str, str], silence_limit_s: float
    ) -> ShellResult:
        variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        command = " ".join(["cd", shlex.quote(folder), "&&", *variables, shlex.join(words)])
        return self.device.shell(command, timeout=silence_limit_s)

    def thermal(self) -> Thermal:
        """Unknown where the system has no thermal service (Android 9 or older)."""
        result = self.device.shell("dumpsys thermalservice")
        return parse_thermal(result.stdout) if result.exit_code == 0 else Thermal(None)

    def clean(self, folder: str) -> None:
        try:
            self.device.shell(f"rm -rf {shlex.quote(folder)}")
        except UnavailableError:  # a device that has gone away must not hide why
            return


def parse_thermal(text: str) -> Thermal:
    """`dumpsys thermalservice`: its status, and the temperatures that the HAL reports now."""
    status = re.search(r"^Thermal Status:\s*([0-9])\b", text, re.MULTILINE)
    _, _, current = text.rpartition("Current temperatures from HAL:")
    found = re.findall(r"Temperature\{mValue=(-?[0-9]{1,6}(?:\.[0-9]+)?),.*?mName=([^,}]+)", current or text)
    number = int(status[1]) if status else None
    known = number is not None and number < len(THERMAL_STATUS)
    return Thermal(number if known else None, {name: float(value) for value, name in found})


def ask(device: Device) -> Phone:
    """Ask one device for everything that the list shows."""
    told = re.findall(r"^\[([^\]]+)\]: \[([^\]]*)\]", device.check("getprop"), re.MULTILINE)
    properties = {name: value[:100] for name, value in told}
    memory = re.search(r"MemTotal:\s*([0-9]{1,15}) kB", device.check("cat /proc/meminfo"))
    present = device.shell("ls -d " + " ".join(NPU_LIBRARIES.values())).stdout.split()
    api = properties.get("ro.build.version.sdk", "?")
    return Phone(
        serial=device.serial,
        state="device",
        model=properties.get("ro.product.model", ""),
        soc=properties.get("ro.soc.model") or properties.get("ro.board.platform", ""),
        memory=int(memory[1]) * 1024 if memory else None,
        system=f"Android {properties.get('ro.build.version.release', '?')} (API {api})",
        runtimes=tuple(name for name, path in NPU_LIBRARIES.items() if path in present),
        thermal=AndroidBench(device).thermal(),
        emulated="1" in (properties.get("ro.kernel.qemu"), properties.get("ro.boot.qemu")),
    )


def phones(server: Server) -> list[Phone]:
    """Every device that the adb server sees; those that cannot be asked are listed with their state."""
    found = []
    for listed in server.devices():
        if listed.state != "device":
            found.append(Phone(listed.serial, listed.state, listed.facts.get("model", "")))
            continue
        try:
            found.append(ask(Device(server, listed.serial)))
        except UnavailableError as error:  # one that drops out while it is asked must not hide the others
            found.append(Phone(listed.serial, error.problem, listed.facts.get("model", "")))
    return found
