"""Debian packages that tests need. `python -m tests.packages` installs those that are missing, where it may.

Where it may not, the tests that need one are skipped, and the end of the run says what would install them; with
CI=true they fail. A test names its packages with `requires`, a helper that several tests share calls `need`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

# What each package is known by: programs and files, all of them, each one of several names where "|" stands.
PACKAGES: dict[str, tuple[str, ...]] = {
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
    unknown = set(packages) - set(PACKAGES)
    assert not unknown, f"not in the list of packages: {unknown}"
    return pytest.mark.requires(*packages)


def need(*packages: str) -> None:
    """Skip the running test where one of these packages is missing; with CI=true fail it."""
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
    """Path of the first program or file among `names`, "a|b|/c/d"; None where none is here."""
    for name in names.split("|"):
        path = shutil.which(name) if not name.startswith("/") else name if Path(name).exists() else None
        if path is not None:
            return path
    return None


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


def install() -> None:
    """Install what is missing, as root or by a sudo that asks for no password; where that cannot be, go on."""
    lacking = missing()
    if not lacking:
        return
    sudo = as_root()
    if sudo is None or shutil.which("apt-get") is None:
        print(f"may not install {' '.join(lacking)}: tests that need them are skipped", flush=True)
        return
    print(f"installing {' '.join(lacking)} ...", flush=True)
    apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    options = ["--yes", "--no-install-recommends", "-o=Dpkg::Use-Pty=0"]
    subprocess.run([*apt, "update"], check=False)
    subprocess.run([*apt, "install", *options, *lacking], stdout=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    install()
