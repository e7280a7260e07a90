"""Debian packages that tests need: `python tests/packages.py [PACKAGE ...]` installs what is missing, where it may.

Where it may not, the tests that need one are skipped, and the end of the run says what would install them; with
CI=true they fail. A test names its packages with `requires`, a helper that several tests share calls `need`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # make run, which has no pytest, installs by this file too
    import pytest

# What each package is known by: programs, files and libraries, all of them, each one of several where "|" stands.
PACKAGES: dict[str, tuple[str, ...]] = {
    "libatomic1": ("libatomic.so.1",),  # Qualcomm's compiler and simulator load it: `make run` needs it as well
    "adb": ("adb",),
    "qemu-user": ("qemu-aarch64",),
    "gcc": ("cc|gcc",),
    "libc6-dev": ("/usr/include/stdio.h",),
    "debian-archive-keyring": ("/usr/share/keyrings/debian-archive-keyring.gpg",),
    "apksigner": ("apksigner",),
    "zipalign": ("zipalign",),
    "aapt": ("aapt2",),
    "clang-19": ("clang-19|clang",),
    "lld-19": ("ld64.lld-19|ld64.lld",),
    "kotlin": ("kotlinc", "/usr/share/java/kotlin-stdlib.jar", "/usr/share/java/kotlin-stdlib-jdk7.jar"),
    "default-jdk-headless": ("java", "javac"),
    "libandroid-json-java": ("/usr/share/java/com.android.json.jar",),
    "openssl": ("openssl",),
    "chromium": ("chromium|chromium-browser|google-chrome",),
}
LACKS = "needs Debian's "  # how the reason of a skip begins


def requires(*packages: str) -> pytest.MarkDecorator:
    """A mark: the test is skipped where one of these packages is missing; with CI=true it fails."""
    import pytest

    unknown = set(packages) - set(PACKAGES)
    assert not unknown, f"not in the list of packages: {unknown}"
    return pytest.mark.requires(*packages)


def need(*packages: str) -> None:
    """Skip the running test where one of these packages is missing; with CI=true fail it."""
    import pytest

    lacking = missing(packages)
    if lacking:
        reason = LACKS + ", ".join(lacking)
        if in_ci():
            pytest.fail(f"{reason}: {command(lacking)}", pytrace=False)
        pytest.skip(reason)


def missing(packages: Iterable[str] = PACKAGES) -> list[str]:
    """Those of the packages that are not here."""
    return [package for package in packages if not all(find(names) for names in PACKAGES[package])]


def find(names: str) -> str | None:
    """The first of `names`, "program|/a/file|libx.so.1", that is here, a program with its path; None: none is."""
    return next(filter(None, map(_find, names.split("|"))), None)


def _find(name: str) -> str | None:
    if name.startswith("/"):
        return name if Path(name).exists() else None
    if ".so" not in name:
        return shutil.which(name)
    try:
        ctypes.CDLL(name)
    except OSError:
        return None
    return name


def command(packages: Iterable[str]) -> str:
    """What a user types to install them."""
    root = "" if os.geteuid() == 0 else "sudo "
    return f"{root}apt-get install --no-install-recommends {' '.join(packages)}"


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("true", "1")


def as_root() -> list[str] | None:
    """What goes before a command of root's; None where it would ask for a password."""
    if os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n"]
    may = shutil.which("sudo") and subprocess.run([*sudo, "true"], capture_output=True, check=False).returncode == 0
    return sudo if may else None


def install(packages: Sequence[str]) -> None:
    """Install what is missing, as root or by a sudo that asks for no password; where that cannot be, say so."""
    lacking = missing(packages)
    if not lacking:
        return
    sudo = as_root()
    if sudo is not None and shutil.which("apt-get"):
        print(f"installing {' '.join(lacking)} ...", flush=True)
        apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
        options = ["--yes", "--no-install-recommends", "-o=Dpkg::Use-Pty=0"]
        subprocess.run([*apt, "update"], check=False)
        subprocess.run([*apt, "install", *options, *lacking], stdout=subprocess.DEVNULL, check=False)
        lacking = missing(packages)
    if lacking:
        print(f"missing: {' '.join(lacking)}; what installs them:\n  {command(lacking)}", flush=True)


if __name__ == "__main__":
    install(sys.argv[1:] or list(PACKAGES))
