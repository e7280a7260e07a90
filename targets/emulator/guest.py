"""Artifacts as arm64 code on this machine: qemu-aarch64 runs the aarch64 wheels with their real NEON
kernels."""

from __future__ import annotations

import io
import select
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np

from bluelm.errors import ExportError, TargetError
from bluelm.system.children import HEARTBEAT_S, Watch, killed, name_of
from export.artifacts.artifact import Artifact
from targets.emulator.count import CPU, GRAPHS, QEMU, qemu_version
from targets.emulator.feeds import host
from targets.emulator.userland import PYTHON, userland, wheels
from targets.host.cached_runtime import Feeds, Step
from targets.runtime import Runtime

GUEST = Path(__file__).parents[1] / "data" / "arm64_guest.py"
TAIL = 500


def install() -> Path:
    """Set up the arm64 userland once; its root.

    Raises:
        UnavailableError: no qemu, not a Debian-like host, or no network.
    """
    qemu_version()
    return userland(wheels())


class Guest:
    """A Python under qemu that holds an artifact's graphs; one message at a time."""

    def __init__(self, kind: str, paths: list[Path]) -> None:
        root = install()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the guest)
        python = str(root / f"usr/bin/python{PYTHON}")
        command = [QEMU, "-cpu", CPU, "-L", str(root), python, str(GUEST), kind]
        self._process = subprocess.Popen(
            [*command, *(str(path.resolve()) for path in paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what was read ahead would not wake `select`
            stderr=self._log,
            env={"PATH": "/usr/bin", "HOME": "/", "LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._watch = Watch(self._process.pid, "the arm64 guest")
        self._read()

    def step(self, graph: str) -> Step:
        """Runs one graph: inputs by name to outputs by name."""

        def run(feeds: Feeds) -> Mapping[str, np.ndarray]:
            message = io.BytesIO()
            np.savez(message, graph=np.array(graph), **feeds)  # pyright: ignore[reportArgumentType]
            data = message.getvalue()
            try:
                rest = memoryview(len(data).to_bytes(8, "little") + data)
                while rest:
                    rest = rest[piped(self._process.stdin).write(rest) :]
            except BrokenPipeError:
                raise self._died() from None
            return dict(np.load(io.BytesIO(self._read())))

        return run

    def close(self) -> None:
        """End the guest; calling again does nothing."""
        if not piped(self._process.stdin).closed:
            piped(self._process.stdin).close()
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            piped(self._process.stdout).close()
            self._log.close()

    def _read(self) -> bytes:
        size = int.from_bytes(self._exactly(8), "little")
        return self._exactly(size)

    def _exactly(self, count: int) -> bytes:
        """Read so many bytes of its answer; a stopped process is reported."""
        pipe, found = piped(self._process.stdout), bytearray()
        while len(found) < count:
            while not select.select([pipe], [], [], HEARTBEAT_S)[0]:
                self._watch.look()
            part = pipe.read(min(count - len(found), 1 << 20))
            if not part:
                raise self._died()
            found += part
        return bytes(found)

    def _died(self) -> ExportError:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip()[-TAIL:]
        self.close()
        return killed("the arm64 guest", code, GUEST) or TargetError(
            f"the artifact failed as arm64 code ({name_of(code)}): {said}", where=GUEST
        )


def piped(stream: IO[bytes] | None) -> IO[bytes]:
    """A stream of a process that was started with pipes."""
    assert stream is not None
    return stream


def open_emulated(artifact: Artifact, kind: str, roles: tuple[str, ...]) -> Runtime:
    """An artifact whose graphs are the files of `roles`, as arm64 code.

    Raises:
        UnavailableError: qemu or the userland is not there.
        TargetError: the graphs do not load.
    """
    package = artifact.record.package
    name = f"{artifact.format} in {package} {version(package)} on {CPU} under qemu"
    guest = Guest(kind, [artifact.path(role) for role in roles])
    runtime = host(name, artifact, *(guest.step(graph) for graph in GRAPHS))
    runtime.close = guest.close
    return runtime
