"""An unpacked arm64 Debian with Python and onnxruntime for qemu-aarch64: made once, kept in the user's cache.

No root is needed: packages are fetched by apt with a configuration of its own, unpacked by dpkg-deb, never
installed. 16 MB of packages and 60 MB of wheels.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from bluelm.errors import UnavailableError
from bluelm.system.children import run
from bluelm.system.files import atomic_folder, user_cache

SUITE, PYTHON = "bookworm", "3.11"  # of one Debian release, so that counts do not move with the host
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
SITE = "opt/site"
LITERT = (  # ai-edge-litert and what it imports
    "ai-edge-litert==2.3.0",
    "backports.strenum==1.2.8",
    "flatbuffers==25.12.19",
    "ml_dtypes==0.6.0",
    "protobuf==7.36.2",
    "tqdm==4.70.1",
    "typing_extensions==4.16.0",
)

# What onnxruntime reads of the machine at its start; the host's own files describe an x86 and make it crash.
CPUINFO = """processor\t: 0
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0b
CPU revision\t: 1
"""
CPU_FOLDER = "sys/devices/system/cpu"


def wheels() -> list[str]:
    """What runs there: this machine's own onnxruntime (the first) and numpy, and LiteRT."""
    return [*(f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")), *LITERT]


def userland(wheels: Sequence[str]) -> Path:
    """The root of the userland with these wheels ("name==version") in /opt/site; made if it is not there.

    Raises:
        UnavailableError: not a Debian-like host, or no network.
    """
    digest = hashlib.sha256(repr((SUITE, PACKAGES, CPUINFO, sorted(wheels))).encode()).hexdigest()[:12]
    root = user_cache() / f"arm64-{digest}"
    if root.is_dir():
        return root
    for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(tool) is None:
            fix = f"on a Debian-like system, install {package}"
            raise UnavailableError(f"{tool} is not here, which fetches the arm64 userland", fix=fix)
    if not KEYRING.exists():
        fix = "apt-get install debian-archive-keyring"
        raise UnavailableError("Debian's signing keys are not installed", where=KEYRING, fix=fix)
    with atomic_folder(root) as temporary:
        work = temporary / "work"
        _unpack_packages(work, temporary)
        _unpack_wheels(work, temporary, wheels)
        shutil.rmtree(work)
        _describe_cpu(temporary)
    return root


def _unpack_packages(work: Path, root: Path) -> None:
    for folder in ("state/lists/partial", "cache/archives/partial", "log"):
        (work / folder).mkdir(parents=True)
    (work / "state/status").touch()
    source = f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {SUITE} main\n"
    (work / "sources.list").write_text(source, encoding="utf-8")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": str(work / "state"),
        "Dir::State::status": str(work / "state/status"),
        "Dir::Cache": str(work / "cache"),
        "Dir::Log": str(work / "log"),
        "Dir::Etc::sourcelist": str(work / "sources.list"),
        "Dir::Etc::sourceparts": "-",
        "Acquire::Languages": "none",
    }
    lines = "".join(f'{name} "{value}";\n' for name, value in settings.items())
    (work / "apt.conf").write_text(lines, encoding="utf-8")
    environment = {**os.environ, "APT_CONFIG": str(work / "apt.conf"), "DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "-q", "update"], environment)
    options = ["-q", "-y", "--download-only", "--no-install-recommends"]
    _run(["apt-get", *options, "install", *PACKAGES], environment)
    packages = sorted((work / "cache/archives").glob("*.deb"))
    if not packages:
        raise UnavailableError("apt-get fetched no packages for arm64", fix="check the network")
    for package in packages:
        _run(["dpkg-deb", "-x", str(package), str(root)])


def _unpack_wheels(work: Path, root: Path, wheels: Sequence[str]) -> None:
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
    _run([*command, "--python-version", PYTHON, "-d", str(work / "wheels"), *wheels])
    for wheel in sorted((work / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / SITE)


def _describe_cpu(root: Path) -> None:
    """One Cortex-A76, as `-cpu cortex-a76` emulates it; empty files where the host's would be found."""
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(CPUINFO, encoding="utf-8")
    cpu = root / CPU_FOLDER
    for index in range(5):
        (cpu / f"cpu0/cache/index{index}").mkdir(parents=True)
        for name in ("level", "size", "type", "shared_cpu_list"):
            (cpu / f"cpu0/cache/index{index}/{name}").touch()
    for name in ("present", "possible", "online"):
        (cpu / name).write_text("0\n", encoding="utf-8")


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    done = run(command, Path(command[0]).name, environment=environment)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-500:]
        problem = f"the arm64 userland could not be made: {command[0]} said: {said}"
        raise UnavailableError(problem, fix="check the network and the package mirrors, then run again")
