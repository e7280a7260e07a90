"""A phone for tests: our adb server in a process of its own; its commands answer as a vivo X100 does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from targets.phones.adb import Server
from tests.support.phones.adb_server import SERIAL

PROPERTIES = {
    "ro.product.model": "V2309A",
    "ro.soc.manufacturer": "Mediatek",
    "ro.soc.model": "MT6989",
    "ro.board.platform": "mt6989",
    "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
}
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
	callbacks: 2
Thermal Status: {status}
Cached temperatures:
	Temperature{{mValue=31.0, mType=3, mName=skin_old, mStatus=0}}
HAL Ready: true
HAL connection:
	ThermalHAL 2.0 connected: yes
Current temperatures from HAL:
	Temperature{{mValue=41.5, mType=0, mName=cpu-big, mStatus=0}}
	Temperature{{mValue=33.2, mType=3, mName=skin, mStatus=0}}
Current cooling devices from HAL:
	CoolingDevice{{mValue=0, mType=2, mName=cpu}}
"""
DUMPSYS = r"""#!/bin/sh
[ "$1" = package ] && exec cat "bin/package-$2"
[ "$1" = thermalservice ] || exit 20
first=$(head -n 1 bin/thermal)   # one status a look; the last one stays
[ "$(wc -l < bin/thermal)" -gt 1 ] && sed -i 1d bin/thermal
sed "s/{status}/$first/" bin/thermal.txt
"""


class FakePhone:
    """The phone's folder and the port of its adb server."""

    serial = SERIAL

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        self.server = Server("127.0.0.1", port)

    def fault(self, **faults: object) -> None:
        (self.root / "faults.json").write_text(json.dumps(faults))

    def heat(self, *statuses: int) -> None:
        """What the next looks at the thermal service find; the last one stays."""
        (self.root / "bin" / "thermal").write_text("".join(f"{s}\n" for s in statuses))

    def app(self, package: str, version_name: str) -> None:
        """Install a chat app of the Gradle project, as the package manager tells of it."""
        home = "" if package == "org.bluelm.chat" else "org.bluelm.chat"  # shortened as Android does
        with (self.root / "bin" / "activities").open("a") as file:
            file.write(f"  priority=0 preferredOrder=0 match=0x108000\n  {package}/{home}.MainActivity\n")
        told = f"Packages:\n  Package [{package}] (5a3c2f1):\n    versionCode=1 minSdk=24\n"
        (self.root / "bin" / f"package-{package}").write_text(f"{told}    versionName={version_name}\n")

    def files(self) -> list[str]:
        """What lies in the phone's /data/local/tmp."""
        folder = self.root / "data" / "local" / "tmp"
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def furnish(root: Path) -> None:
    """The phone's commands and files."""
    for folder in ("bin", "data/local/tmp", "vendor/lib64"):
        (root / folder).mkdir(parents=True)
    (root / "vendor/lib64/libneuron_adapter_mgvi.so").touch()
    lines = "".join(f"[{name}]: [{value}]\n" for name, value in PROPERTIES.items())
    (root / "bin/properties").write_text(lines)
    (root / "bin/thermal.txt").write_text(THERMAL.replace("{{", "{").replace("}}", "}"))
    (root / "bin/thermal").write_text("0\n")
    (root / "bin/activities").write_text("3 activities found:\n  com.android.settings/.Settings\n")
    scripts = {"getprop": "cat bin/properties", "cmd": '[ "$2" = query-activities ] && cat bin/activities'}
    for name, script in (*((n, f"#!/bin/sh\n{s}\n") for n, s in scripts.items()), ("dumpsys", DUMPSYS)):
        path = root / "bin" / name
        path.write_text(script)
        path.chmod(0o755)


@contextmanager
def running_phone(root: Path) -> Iterator[FakePhone]:
    """Start the server process; end it behind the block. Its shell is this machine's, with its /proc."""
    if sys.platform != "linux":
        pytest.skip("the phone's commands need Linux")
    furnish(root)
    script = Path(__file__).parent / "adb_server.py"
    with subprocess.Popen([sys.executable, str(script), str(root)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield FakePhone(root, int(process.stdout.readline()))
        finally:
            process.kill()
