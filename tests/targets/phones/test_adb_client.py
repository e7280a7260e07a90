"""The adb client against a server process of the real wire protocol; Debian's own adb judges that server."""

from __future__ import annotations

import contextlib
import os
import socketserver
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ValidationError

from bluelm.errors import InputError, UnavailableError
from export.bundle.manifest import Requirements
from pipeline.bundles.install import objections
from targets.phones.adb import CHUNK, Server, ShellResult
from targets.phones.phone import Thermal, ask, parse_thermal, phones
from tests.packages import requires
from tests.support.bundles import draft
from tests.support.limits import HANG_S
from tests.support.phones.phone import FakePhone

BIG = os.urandom(5 * CHUNK + 17)


def adb(phone: FakePhone, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Android's own client against our server: if that were not adb's protocol, it would not work."""
    command = ["adb", "-P", str(phone.server.port), "-s", phone.serial, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)


@requires("adb")
def test_the_real_adb_accepts_our_server(phone, tmp_path):
    listed = subprocess.run(
        ["adb", "-P", str(phone.server.port), "devices", "-l"],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    assert phone.serial in listed.stdout and "model:V2309A" in listed.stdout
    assert adb(phone, "shell", "-T", "echo out; echo err >&2; exit 7").returncode == 7
    local = tmp_path / "big"
    local.write_bytes(BIG)
    pushed = adb(phone, "push", str(local), "/data/local/tmp/by_adb")
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    assert adb(phone, "pull", "/data/local/tmp/by_adb", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == BIG
    phone.fault(disk_bytes=CHUNK)
    full = adb(phone, "push", str(local), "/data/local/tmp/full")
    assert full.returncode != 0 and "No space left" in full.stdout + full.stderr


def test_version_and_devices(phone):
    assert phone.server.version() == 41
    (listed,) = phone.server.devices()
    assert (listed.serial, listed.state, listed.facts["model"]) == (phone.serial, "device", "V2309A")


def test_shell_tells_both_streams_and_the_exit_code_apart(phone):
    result = phone.server.device(phone.serial).shell("echo out; echo err >&2; exit 7")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 7)


def test_shell_with_long_output(phone):
    result = phone.server.device(phone.serial).shell("seq 1 100000")
    assert result.stdout.splitlines()[-1] == "100000"
    assert result.exit_code == 0


@pytest.mark.parametrize("features", ["shell_v2,stat_v2", "shell_v2"])
@pytest.mark.parametrize("content", [b"", b"x", BIG[:CHUNK], BIG])
def test_push_stat_pull(phone, tmp_path, content, features):
    phone.fault(features=features)
    device = phone.server.device(phone.serial)
    local, back = tmp_path / "a b", tmp_path / "back"
    local.write_bytes(content)
    sent: list[int] = []
    device.push(local, "/data/local/tmp/a b", 0o755, sent.append)
    assert sum(sent) == len(content)
    found = device.stat("/data/local/tmp/a b")
    assert found is not None and found.size == len(content) and found.mode & 0o777 == 0o755
    assert device.stat("/data/local/tmp/none") is None
    device.pull("/data/local/tmp/a b", back)
    assert back.read_bytes() == content


def test_disconnect_in_the_middle_of_a_push(phone, tmp_path):
    phone.fault(disconnect_push_after=2 * CHUNK)
    local = tmp_path / "big"
    local.write_bytes(BIG)
    with pytest.raises(UnavailableError, match=r"connection (broke|closed)") as raised:
        phone.server.device(phone.serial).push(local, "/data/local/tmp/half")
    assert raised.value.exit_code == 5


def test_full_disk_is_told_with_the_devices_own_reason(phone, tmp_path):
    phone.fault(disk_bytes=CHUNK)
    local = tmp_path / "big"
    local.write_bytes(BIG * 40)  # 13 MB: more than any socket buffer, so the answer comes while we send
    with pytest.raises(UnavailableError, match="No space left on device"):
        phone.server.device(phone.serial).push(local, "/data/local/tmp/full")


def test_disconnect_while_a_command_runs(phone):
    phone.fault(disconnect_shell="runner")
    with pytest.raises(UnavailableError, match="closed in the middle"):
        phone.server.device(phone.serial).shell("./runner")


def test_what_answers_is_not_adb(phone):
    phone.fault(garbage=True)
    with pytest.raises(UnavailableError, match="not an adb server"):
        phone.server.devices()


def test_a_missing_file_is_not_pulled_and_leaves_nothing(phone, tmp_path):
    with pytest.raises(UnavailableError, match="No such file"):
        phone.server.device(phone.serial).pull("/data/local/tmp/none", tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", ["offline", "unauthorized"])
def test_a_device_that_is_not_ready(phone, state):
    phone.fault(state=state)
    with pytest.raises(UnavailableError, match=state):
        phone.server.device(phone.serial)
    assert [p.state for p in phones(phone.server)] == [state]


def test_unknown_serial_lists_the_known_ones(phone):
    with pytest.raises(UnavailableError, match=phone.serial):
        phone.server.device("nobody")


def test_no_server_says_what_to_do():
    with pytest.raises(UnavailableError, match="start-server") as raised:
        Server("127.0.0.1", 1).devices()
    assert raised.value.exit_code == 5


def test_a_port_that_is_none(monkeypatch):
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "high")
    with pytest.raises(InputError, match="ANDROID_ADB_SERVER_PORT"):
        Server()


def test_an_old_android_without_shell_v2(phone):
    phone.fault(features="cmd")
    with pytest.raises(UnavailableError, match="shell v2"):
        phone.server.device(phone.serial).shell("true")


def test_list_tells_chip_memory_system_libraries_and_heat(phone):
    phone.heat(2)
    (found,) = phones(phone.server)
    own = int(next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line))
    assert (found.soc, found.model, found.system) == ("MT6989", "V2309A", "Android 14 (API 34)")
    assert found.memory == own * 1024  # the phone's /proc/meminfo is this machine's
    assert found.runtimes == ("NeuroPilot",)
    assert str(found.thermal) == "moderate, hottest sensor 42 °C"


class OddWords(socketserver.BaseRequestHandler):
    """Answers every request with what the test wants to be said."""

    said: ClassVar[dict[bytes, bytes]] = {}

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                name = self.request.recv(int(self.request.recv(4), 16))
                self.request.sendall(next(answer for key, answer in self.said.items() if name.startswith(key)))


@pytest.fixture
def odd() -> Iterator[Server]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), OddWords) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Server("127.0.0.1", server.server_address[1])
        server.shutdown()


def test_odd_words_of_a_server(odd: Server) -> None:
    """What another program, or a broken one, says at adb's port."""
    OddWords.said = {
        b"host:version": b"OKAY0002zz",
        b"host:devices-l": b"OKAY001flonely\n\n  \nX1 device model:a:b x\n",
        b"host-serial": b"OKAY0008shell_v2",
        b"host:transport": b"OKAY",
        b"shell": b"OKAY" + struct.pack("<BI", 1, 0xFFFFFFFF),
        b"sync:": b"OKAY" + struct.pack("<4sI", b"FAIL", 0xFFFFFFFF),
    }
    with pytest.raises(UnavailableError, match="not an adb server: 'zz'"):
        odd.version()
    assert [(found.serial, found.state) for found in odd.devices()] == [("lonely", ""), ("X1", "device")]
    with pytest.raises(UnavailableError, match="wrote more than"):
        odd.device("X1").shell("ls")
    with pytest.raises(UnavailableError, match="sent b'FAIL' of 4294967295 bytes"):
        odd.device("X1").pull("/a", Path("never"))


class Talker:
    """A device whose every command is answered by a text."""

    serial = "X1"

    def __init__(self, text: str) -> None:
        self.text = text

    def check(self, command: str) -> str:
        return self.text

    def shell(self, command: str) -> ShellResult:
        return ShellResult(self.text, "", 0)


@pytest.mark.parametrize(
    "text",
    [
        f"MemTotal: {'9' * 5000} kB",
        "Thermal Status: \u0663\nCurrent temperatures from HAL:\nTemperature{mValue=1.2.3, mName=a}",
        f"Thermal Status: {'3' * 5000}\nTemperature{{mValue={'9' * 5000}.0, mName=a}}",
        f"[ro.build.version.sdk]: [{'9' * 5000}]",
        "\x1b[2J\0\n::error::",
    ],
)
def test_odd_words_of_a_phone(text: str) -> None:
    found = ask(Talker(text))  # pyright: ignore[reportArgumentType]
    assert found.memory is None and found.thermal == Thermal(None)
    assert all(len(word) < 200 for word in objections(draft("apk"), found))
    assert "needs Android API 24" in objections(draft("apk"), found)[0]


@pytest.mark.parametrize("word", ["latest", "", "18.x", "9" * 5000, "1.2.3.4.5", "\u0663"])
def test_a_system_that_is_no_number_is_no_requirement(word: str) -> None:
    """It was compared with the phone's, by a ValueError."""
    with pytest.raises(ValidationError, match="min_os"):
        Requirements.model_validate({"os": "ios", "min_os": word, "min_ram_bytes": 1, "ram_basis": ""})


def test_thermal_texts():
    assert parse_thermal("Permission denial").status is None
    assert parse_thermal("Thermal Status: 9\n").status is None
    now = "Current temperatures from HAL:\n\tTemperature{mValue=-5.5, mType=3, mName=skin}"
    found = parse_thermal(f"Thermal Status: 3\n{now}")
    assert (found.status, found.temperatures) == (3, {"skin": -5.5})
