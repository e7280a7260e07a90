"""iPhones and iPads through Xcode's `devicectl`: list them, and run an app of the user's as the benchmark program.

iOS runs no loose binaries: the app (named by its bundle identifier) takes that program's arguments and writes what that
program writes. It also answers `--thermal-state` with the word of
ProcessInfo.thermalState: nominal, fair, serious or critical.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bluelm.errors import InputError, UnavailableError
from bluelm.system.children import run
from bluelm.system.reading import read_json
from targets.phones.adb import ShellResult
from targets.phones.phone import Phone, Thermal

TABLE = Path(__file__).parents[1] / "data" / "apple_devices.yaml"
# ProcessInfo.ThermalState in Android's numbers
STATES = {"nominal": 0, "fair": 1, "serious": 3, "critical": 4}


def available() -> bool:
    """Whether Xcode's command line tools are here."""
    return shutil.which("xcrun") is not None


def devicectl(*arguments: str, timeout: float = 60) -> dict[str, Any]:
    """Run `xcrun devicectl` and return its JSON.

    Raises:
        UnavailableError: no Xcode, it failed, or it wrote no JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.json"
        done = _xcrun([*arguments, "--json-output", str(output)], timeout)
        if done.returncode != 0:
            said = done.stderr.strip()[-300:]
            raise UnavailableError(f"devicectl {' '.join(arguments[:2])} failed: {said}", fix="see it in Xcode")
        try:
            return read_json(output)
        except InputError as error:
            raise UnavailableError(f"devicectl wrote no JSON: {error}", fix="update Xcode to 15 or newer") from error


def _xcrun(arguments: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    command = ["xcrun", "devicectl", *arguments]
    try:
        return run(command, "devicectl", limit_s=timeout)
    except FileNotFoundError as error:
        fix = "on a Mac, install Xcode 15 or newer; iPhones cannot be reached from elsewhere"
        raise UnavailableError("Xcode's devicectl is not installed", fix=fix) from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"devicectl did not answer within {timeout:.0f} s", fix="reconnect it") from error


def phones() -> list[Phone]:
    """Devices that devicectl sees."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    try:
        return [parse(entry, table) for entry in devicectl("list", "devices")["result"]["devices"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UnavailableError(f"devicectl lists devices in another form: {error!r}", fix="update Xcode") from error


def parse(entry: Mapping[str, Any], table: Mapping[str, Mapping[str, Any]]) -> Phone:
    """One entry of `devicectl list devices --json-output`."""
    hardware, device = entry.get("hardwareProperties", {}), entry.get("deviceProperties", {})
    connection = entry.get("connectionProperties", {})
    product = hardware.get("productType", "")
    known = table.get(product, {})
    memory = known.get("memory_gib")
    connected = connection.get("tunnelState") in ("connected", "disconnected")  # asleep tunnels open on use
    paired = connection.get("pairingState") == "paired"
    state = "device" if connected and paired else "unpaired" if not paired else "unavailable"
    return Phone(
        serial=hardware.get("udid") or entry["identifier"],
        state=state,
        model=hardware.get("marketingName") or product,
        soc=known.get("soc", ""),
        memory=memory * 2**30 if memory else None,
        system=f"{hardware.get('platform', 'iOS')} {device.get('osVersionNumber', '?')}",
        runtimes=("Core ML",),
    )


class AppleBench:
    """An iPhone with the app of the given bundle identifier installed."""

    def __init__(self, serial: str, bundle: str) -> None:
        self.serial = serial
        self.bundle = bundle

    def prepare(self, folder: str) -> None:
        """The app's container needs no folders made: copying makes them."""

    def push(self, local: Path, remote: str, mode: int, advance: Callable[[int], None]) -> None:
        where = ("--domain-type", "appDataContainer", "--domain-identifier", self.bundle)
        source = ("--source", str(local), "--destination", remote.lstrip("/"))
        devicectl("device", "copy", "to", "--device", self.serial, *where, *source, timeout=3600)
        advance(local.stat().st_size)

    def run(
        self, words: Sequence[str], folder: str, environment: Mapping[str, str], silence_limit_s: float
    ) -> ShellResult:
        """Launch the app with the words behind the first, its console attached until it ends."""
        variables = ("--environment-variables", json.dumps(dict(environment)))
        launch = ("device", "process", "launch", "--console", "--terminate-existing", "--device", self.serial)
        done = _xcrun([*launch, *variables, self.bundle, *words[1:]], silence_limit_s)
        return ShellResult(done.stdout, done.stderr, done.returncode)

    def thermal(self) -> Thermal:
        """What the app says; unknown where it does not know the question."""
        said = self.run(["app", "--thermal-state"], "", {}, 60)
        words = said.stdout.lower().split()
        return Thermal(next((STATES[w] for w in words if w in STATES), None))

    def clean(self, folder: str) -> None:
        """iOS gives no way to remove files of an app from outside: the next run overwrites them."""
