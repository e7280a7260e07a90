"""A client of the adb server: list devices, run a command (shell v2), push, pull and stat files (sync).

Speaks the server's smart-socket protocol (packages/modules/adb: OVERVIEW.TXT, SERVICES.TXT, SYNC.TXT, and
shell_protocol.h). Own code because what a benchmark must know is what the libraries drop: adbutils 2.12
answers a full disk with the word FAIL, may send short, and reads file sizes as 32 bits.

    request    4 hex digits of length, then the service's name; answer OKAY, or FAIL + length + reason
    shell v2   packets: one byte id (1 stdout, 2 stderr, 3 exit code), uint32 length, data
    sync       4 letters + uint32: SEND path,mode / DATA / DONE mtime -> OKAY | FAIL; RECV -> DATA* DONE;
               STAT and, where the device knows it, STA2 (64-bit sizes)
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bluelm.errors import InputError, UnavailableError
from bluelm.system.files import atomic_file

MOST_OUTPUT = 64 << 20  # bytes that a command may write; what is asked for has some kilobytes
CHUNK = 64 * 1024  # SYNC.TXT: data chunks are at most 64 KiB
_STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = 1, 2, 3, 4
_STAT2 = struct.Struct("<IQQIIIIQqqq")  # error, dev, ino, mode, nlink, uid, gid, size, atime, mtime, ctime


@dataclass(frozen=True)
class Listed:
    """A line of `adb devices -l`; state is "device", "offline", "unauthorized" ..."""

    serial: str
    state: str
    facts: dict[str, str]


@dataclass(frozen=True)
class ShellResult:
    """What a command wrote and how it ended."""

    stdout: str
    stderr: str
    exit_code: int


@dataclass(frozen=True)
class RemoteFile:
    """Mode as in stat(2), size in bytes, seconds since the epoch."""

    mode: int
    size: int
    mtime: int

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Connection:
    """One socket to the adb server; every read and write has a time limit in seconds."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        try:
            self.socket = socket.create_connection((host, port), timeout=timeout)
        except OSError as error:
            raise UnavailableError(
                f"no adb server answers: {error}",
                where=f"{host}:{port}",
                fix="install Android's platform-tools and run `adb start-server`",
            ) from error

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise lost(f"the connection broke while sending: {error}") from error

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes.

        Raises:
            UnavailableError: the other side closed or stayed silent beyond the limit.
        """
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self.socket.recv(min(count - len(parts), 1 << 20))
            except TimeoutError as error:
                raise lost("the device stayed silent beyond the time limit") from error
            except OSError as error:
                raise lost(f"the connection broke: {error}") from error
            if not part:
                raise lost("the connection closed in the middle of an answer")
            parts += part
        return bytes(parts)

    def request(self, service: str) -> None:
        """Ask for a service and wait for OKAY."""
        name = service.encode()
        self.send(b"%04x%s" % (len(name), name))
        answer = self.read(4)
        if answer == b"FAIL":
            raise UnavailableError(f"adb refused: {self.text()}", where=service, fix="see `adb devices -l`")
        if answer != b"OKAY":
            raise UnavailableError(f"what answers is not an adb server: {answer!r}", where=service)

    def text(self) -> str:
        """A string with its length in 4 hex digits before it."""
        digits = self.read(4)
        try:
            length = int(digits, 16)
        except ValueError as error:
            raise UnavailableError(f"what answers is not an adb server: {digits!r}") from error
        return self.read(length).decode(errors="replace")

    def close(self) -> None:
        self.socket.close()


def lost(problem: str) -> UnavailableError:
    return UnavailableError(problem, fix="check the cable and `adb devices -l`, then run again")


class Server:
    """The adb server that a user's `adb` talks to as well."""

    def __init__(self, host: str | None = None, port: int | None = None) -> None:
        self.host = host or os.environ.get("ANDROID_ADB_SERVER_ADDRESS", "127.0.0.1")
        text = os.environ.get("ANDROID_ADB_SERVER_PORT", "5037")
        if port is None and not (text.isdecimal() and len(text) < 6):
            raise InputError(f"ANDROID_ADB_SERVER_PORT is not a port: {text!r}", fix="unset it, or name a port")
        self.port = port or int(text)

    @contextmanager
    def connect(self, service: str, timeout: float = 30) -> Iterator[Connection]:
        connection = Connection(self.host, self.port, timeout)
        try:
            connection.request(service)
            yield connection
        finally:
            connection.close()

    def version(self) -> int:
        """The server's protocol version, 41 for today's."""
        with self.connect("host:version") as connection:
            text = connection.text()
        try:
            return int(text, 16)
        except ValueError as error:
            raise UnavailableError(f"what answers is not an adb server: {text[:40]!r}") from error

    def devices(self) -> list[Listed]:
        with self.connect("host:devices-l") as connection:
            text = connection.text()
        found = []
        for line in text.splitlines():
            serial, state, *facts = (*line.split(), "", "")
            if not serial:
                continue
            pairs = (fact.partition(":") for fact in facts if ":" in fact)
            found.append(Listed(serial, state, {name: value for name, _, value in pairs}))
        return found

    def device(self, serial: str) -> Device:
        """The device of that serial, ready to work.

        Raises:
            UnavailableError: not connected, offline, or this computer is not authorised on it.
        """
        listed = {d.serial: d for d in self.devices()}
        if serial not in listed:
            known = ", ".join(listed) or "none"
            raise UnavailableError(f"no device {serial!r} is connected", fix=f"connected: {known}")
        state = listed[serial].state
        if state != "device":
            fix = "accept this computer's key on its screen" if state == "unauthorized" else "reconnect it"
            raise UnavailableError(f"the device is {state}", where=serial, fix=fix)
        return Device(self, serial)


class Device:
    """One Android device."""

    def __init__(self, server: Server, serial: str) -> None:
        self.server = server
        self.serial = serial
        self._features: frozenset[str] | None = None

    @property
    def features(self) -> frozenset[str]:
        """What both ends can do, e.g. "shell_v2", "stat_v2"."""
        if self._features is None:
            with self.server.connect(f"host-serial:{self.serial}:features") as connection:
                self._features = frozenset(connection.text().split(","))
        return self._features

    @contextmanager
    def _service(self, name: str, timeout: float = 30) -> Iterator[Connection]:
        with self.server.connect(f"host:transport:{self.serial}", timeout) as connection:
            connection.request(name)
            yield connection

    def shell(self, command: str, timeout: float = 60) -> ShellResult:
        """Run `command` in the device's shell; `timeout` is the longest silence in seconds.

        Raises:
            UnavailableError: no shell v2 (Android 6 or older), disconnected, silent too long.
        """
        if "shell_v2" not in self.features:
            raise UnavailableError("the device has no shell v2, so exit codes are unknown", where=self.serial)
        output = {_STDOUT: bytearray(), _STDERR: bytearray()}
        with self._service(f"shell,v2,raw:{command}", timeout) as connection:
            connection.send(struct.pack("<BI", _CLOSE_STDIN, 0))
            while True:
                kind, length = struct.unpack("<BI", connection.read(5))
                if length + sum(map(len, output.values())) > MOST_OUTPUT:
                    raise UnavailableError(f"a command wrote more than {MOST_OUTPUT} bytes", where=self.serial)
                data = connection.read(length)
                if kind == _EXIT:
                    out, err = (output[k].decode(errors="replace") for k in (_STDOUT, _STDERR))
                    return ShellResult(out, err, data[0] if data else 255)
                if kind in output:
                    output[kind] += data

    def check(self, command: str, timeout: float = 60) -> str:
        """Standard output of a command that must succeed."""
        result = self.shell(command, timeout)
        if result.exit_code != 0:
            said = (result.stderr or result.stdout).strip()[-500:]
            raise UnavailableError(f"{command!r} ended with {result.exit_code}: {said}", where=self.serial)
        return result.stdout

    def stat(self, path: str) -> RemoteFile | None:
        """Size and mode of a remote path, None where there is nothing."""
        with self._service("sync:") as connection:
            if "stat_v2" in self.features:
                connection.send(_sync(b"STA2", path))
                _expect(connection, b"STA2")
                error, _, _, mode, _, _, _, size, _, mtime, _ = _STAT2.unpack(connection.read(_STAT2.size))
                return None if error else RemoteFile(mode, size, mtime)
            connection.send(_sync(b"STAT", path))
            _expect(connection, b"STAT")
            mode, size, mtime = struct.unpack("<III", connection.read(12))
            return RemoteFile(mode, size, mtime) if mode else None

    def push(self, local: Path, remote: str, mode: int = 0o644, advance: Callable[[int], None] | None = None) -> None:
        """Copy a file to the device and check its size there; `advance` hears of bytes sent.

        Raises:
            UnavailableError: refused (the device's reason is given, e.g. "No space left on device"),
                disconnected, or another size arrived.
        """
        size = local.stat().st_size
        with local.open("rb") as file, self._service("sync:") as connection:
            connection.send(_sync(b"SEND", f"{remote},{stat.S_IFREG | mode}"))
            while chunk := file.read(CHUNK):
                if _says_something(connection):  # a device that cannot write says so at once: stop sending
                    _okay(connection, remote)
                _send_or_reason(connection, b"DATA" + struct.pack("<I", len(chunk)) + chunk, remote)
                if advance:
                    advance(len(chunk))
            mtime = int(local.stat().st_mtime)
            _send_or_reason(connection, b"DONE" + struct.pack("<I", mtime & 0xFFFFFFFF), remote)
            _okay(connection, remote)
        found = self.stat(remote)
        if found is None or found.size != size:
            there = "nothing" if found is None else f"{found.size} bytes"
            raise UnavailableError(f"pushed {size} bytes, {there} arrived", where=remote)

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file from the device; `local` appears only when all of it is here."""
        with (
            atomic_file(local) as temporary,
            temporary.open("wb") as file,
            self._service("sync:") as connection,
        ):
            connection.send(_sync(b"RECV", remote))
            while True:
                kind, length = struct.unpack("<4sI", connection.read(8))
                if kind == b"DONE":
                    return
                if kind == b"FAIL" and length <= CHUNK:
                    reason = connection.read(length).decode(errors="replace")
                    raise UnavailableError(f"the device does not hand the file out: {reason}", where=remote)
                if kind != b"DATA" or length > CHUNK:
                    raise UnavailableError(f"the device sent {kind!r} of {length} bytes", where=remote)
                file.write(connection.read(length))


def _sync(kind: bytes, path: str) -> bytes:
    name = path.encode()
    return kind + struct.pack("<I", len(name)) + name


def _expect(connection: Connection, kind: bytes) -> None:
    found = connection.read(4)
    if found != kind:
        raise UnavailableError(f"the device answered {found!r} where {kind!r} was due")


def _says_something(connection: Connection) -> bool:
    return bool(select.select([connection.socket], [], [], 0)[0])


def _send_or_reason(connection: Connection, data: bytes, remote: str) -> None:
    """Send; where that breaks, the device may have said why before it closed."""
    try:
        connection.send(data)
    except UnavailableError:
        if _says_something(connection):
            _okay(connection, remote)
        raise


def _okay(connection: Connection, remote: str) -> None:
    kind, length = struct.unpack("<4sI", connection.read(8))
    if kind == b"FAIL" and length <= CHUNK:
        reason = connection.read(length).decode(errors="replace")
        fix = "free space on the device" if "space" in reason else "choose another remote folder"
        raise UnavailableError(f"the device refused the file: {reason}", where=remote, fix=fix)
    if kind != b"OKAY":
        raise UnavailableError(f"the device answered {kind!r} to a push", where=remote)
