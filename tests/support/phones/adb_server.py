"""An adb server of ours for tests: the real wire protocol (host, shell v2, sync), a folder as the phone.

`python tests/support/phones/adb_server.py ROOT` listens on a free port, prints it, serves until killed.
ROOT/data is the phone's /data, ROOT/bin holds its commands (getprop, dumpsys ... written by the test).
ROOT/faults.json, read anew at every request, may hold:

    {"disconnect_push_after": BYTES}   the phone vanishes in the middle of a push
    {"disk_bytes": BYTES}              its disk is full beyond so many bytes
    {"state": "offline"}               what `devices` says of it
    {"features": "cmd"}                what it can do (no shell_v2, no stat_v2)
    {"garbage": true}                  what answers is not an adb server
    {"disconnect_shell": "WORD"}       the phone vanishes while a command with WORD runs
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import socketserver
import stat
import struct
import subprocess
import sys
from pathlib import Path

SERIAL = "R58N12345AB"
FEATURES = "shell_v2,cmd,stat_v2,ls_v2,fixed_push_mkdir"


class GoneError(Exception):
    """The phone vanished."""


class Handler(socketserver.BaseRequestHandler):
    root: Path

    def handle(self) -> None:
        with contextlib.suppress(GoneError, ConnectionError):
            self.serve()

    # -- wire
    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.request.recv(count - len(data))
            if not part:
                raise GoneError
            data += part
        return data

    def send(self, data: bytes) -> None:
        self.request.sendall(data)

    def text(self, text: str) -> None:
        data = text.encode()
        self.send(b"OKAY%04x%s" % (len(data), data))

    def fail(self, reason: str) -> None:
        data = reason.encode()
        self.send(b"FAIL%04x%s" % (len(data), data))

    def faults(self) -> dict:
        path = self.root / "faults.json"
        return json.loads(path.read_text()) if path.exists() else {}

    # -- host services
    def serve(self) -> None:
        while True:
            service = self.read(int(self.read(4), 16)).decode()
            faults = self.faults()
            if faults.get("garbage"):
                return self.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            features = faults.get("features", FEATURES)
            state = faults.get("state", "device")
            if service == "host:version":
                return self.text("0029")
            if service in ("host:features", "host:host-features"):
                return self.text(FEATURES)
            if service.startswith("host:devices"):
                facts = " product:k65v1 model:V2309A device:PD2309 transport_id:1" if "-l" in service else ""
                return self.text(f"{SERIAL}{' ' * 12 if facts else chr(9)}{state}{facts}\n")
            if service.endswith(":features") and SERIAL in service:
                return self.text(features)
            if service == "host:transport-any" or service == f"host:transport:{SERIAL}":
                self.send(b"OKAY")
                continue
            if service.startswith("host:tport:"):
                self.send(b"OKAY" + struct.pack("<Q", 1))
                continue
            if service.startswith("shell,v2"):
                self.send(b"OKAY")
                return self.shell(service.partition(":")[2])
            if service == "sync:":
                self.send(b"OKAY")
                return self.sync()
            return self.fail(f"device '{service.rpartition(':')[2]}' not found")

    # -- the phone's shell
    def shell(self, command: str) -> None:
        word = self.faults().get("disconnect_shell")
        if word and word in command:
            raise GoneError
        here = command.replace("/data/", f"{self.root}/data/").replace("/vendor/", f"{self.root}/vendor/")
        done = subprocess.run(
            ["/bin/sh", "-c", here],
            capture_output=True,
            cwd=self.root,
            env={"PATH": f"{self.root}/bin:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            check=False,
        )
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        for kind, data in ((1, done.stdout), (2, done.stderr), (3, bytes([code & 255]))):
            told = data.replace(str(self.root).encode(), b"") if kind < 3 else data
            for start in range(0, len(told), 4096):
                piece = told[start : start + 4096]
                self.send(struct.pack("<BI", kind, len(piece)) + piece)
        self.request.shutdown(socket.SHUT_WR)
        while self.request.recv(4096):  # what the client wrote to the command's input
            pass

    # -- sync
    def local(self, path: str) -> Path:
        return Path(f"{self.root}/{path.lstrip('/')}")

    def sync(self) -> None:
        while True:
            kind, length = struct.unpack("<4sI", self.read(8))
            if kind == b"QUIT":
                return
            path = self.read(length).decode()
            {
                b"SEND": self.receive,
                b"RECV": self.hand_out,
                b"STAT": self.stat1,
                b"STA2": self.stat2,
                b"LST2": self.stat2,
                b"LIST": self.list1,
            }[kind](path)

    def sync_fail(self, reason: str) -> None:
        self.send(b"FAIL" + struct.pack("<I", len(reason)) + reason.encode())

    def receive(self, path_and_mode: str) -> None:
        path, _, mode = path_and_mode.rpartition(",")
        target, faults, got = self.local(path), self.faults(), 0
        reason = ""
        target.parent.mkdir(parents=True, exist_ok=True)  # as adbd does
        if target.is_dir():
            reason = "couldn't create file: Is a directory"
        file = open(os.devnull, "wb") if reason else target.open("wb")  # noqa: SIM115, PTH123
        with file:
            while True:
                kind, length = struct.unpack("<4sI", self.read(8))
                if kind == b"DONE":
                    break
                data = self.read(length)
                got += length
                if got > faults.get("disconnect_push_after", got):
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    raise GoneError
                if got > faults.get("disk_bytes", got) and not reason:
                    reason = f"write failed: {os.strerror(errno.ENOSPC)}"
                    target.unlink()
                    self.sync_fail(reason)  # adbd answers at once, then reads on what still comes
                file.write(data)
        if not reason:
            target.chmod(int(mode) & 0o777)
            self.send(b"OKAY" + struct.pack("<I", 0))

    def hand_out(self, path: str) -> None:
        local = self.local(path)
        if not local.is_file():
            return self.sync_fail("open failed: No such file or directory")
        with local.open("rb") as file:
            while data := file.read(65536):
                self.send(b"DATA" + struct.pack("<I", len(data)) + data)
        return self.send(b"DONE" + struct.pack("<I", 0))

    def stat1(self, path: str) -> None:
        local = self.local(path)
        found = local.stat() if local.exists() else None
        values = (found.st_mode, found.st_size, int(found.st_mtime)) if found else (0, 0, 0)
        self.send(b"STAT" + struct.pack("<III", *values))

    def stat2(self, path: str) -> None:
        local = self.local(path)
        if not local.exists():
            self.send(b"STA2" + struct.pack("<IQQIIIIQqqq", errno.ENOENT, *([0] * 10)))
            return
        s = local.stat()
        values = (
            0,
            s.st_dev,
            s.st_ino,
            s.st_mode,
            s.st_nlink,
            s.st_uid,
            s.st_gid,
            s.st_size,
            0,
            int(s.st_mtime),
            0,
        )
        self.send(b"STA2" + struct.pack("<IQQIIIIQqqq", *values))

    def list1(self, path: str) -> None:
        for entry in sorted(self.local(path).iterdir()):
            s, name = entry.stat(), entry.name.encode()
            self.send(b"DENT" + struct.pack("<IIII", s.st_mode, s.st_size, int(s.st_mtime), len(name)) + name)
        self.send(b"DONE" + bytes(16))


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    assert stat.S_ISDIR(root.stat().st_mode)
    Handler.root = root
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
