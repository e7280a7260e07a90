"""The executable of an IPA: ours, built by clang and ld64.lld without Apple's SDK, or the user's runner
app.
"""

from __future__ import annotations

import plistlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from bluelm.errors import ExportError, InputError, UnavailableError
from bluelm.system.children import run
from bluelm.system.reading import read_bytes
from bluelm.trust.safety import walk

SOURCES = Path(__file__).parent / "templates" / "runner"
EXECUTABLE = "BundleRunner"
_VERSIONS = ("19", "20", "18", "17", "16")
_NESTED = ("Frameworks/", "PlugIns/", "Watch/", "Extensions/", "XPCServices/")
_MACHO = (b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"\xbe\xba\xfe\xca", b"\xca\xfe\xba\xbf")
MOST_BYTES = 256 << 20  # of one file of a user's runner app


@dataclass(frozen=True)
class AppTemplate:
    """An app without its model.

    Attributes:
        identifier: bundle id; None for our own, whose Info.plist follows from the manifest.
        files: every file but the executable and its seal.
        compiler: what built our own.
    """

    executable: str
    code: bytes
    identifier: str | None
    files: dict[str, bytes]
    compiler: str | None = None


def _tool(name: str) -> str | None:
    for candidate in (*(f"{name}-{version}" for version in _VERSIONS), name):
        if found := shutil.which(candidate):
            return found
    return None


def tools() -> tuple[str, str]:
    """Paths of clang and ld64.lld.

    Raises:
        UnavailableError: one is missing.
    """
    clang, linker = _tool("clang"), _tool("ld64.lld")
    if clang is None or linker is None:
        fix = "apt-get install clang-19 lld-19, give your own app with --runner, or use --format xcode"
        raise UnavailableError("an IPA needs clang and ld64.lld for its executable", fix=fix)
    return clang, linker


def present() -> bool:
    """Whether our own runner can be built here."""
    return _tool("clang") is not None and _tool("ld64.lld") is not None


def build(min_os: str) -> AppTemplate:
    """Compile and link our own runner for arm64 iOS.

    Raises:
        UnavailableError: no compiler. ExportError: it failed.
    """
    clang, linker = tools()
    with tempfile.TemporaryDirectory() as folder:
        compile_ = [clang, f"--target=arm64-apple-ios{min_os}", "-fobjc-arc", "-O2", "-nostdinc"]
        compile_ += ["-fno-stack-protector", "-c", "runner.m", "-o", f"{folder}/runner.o"]
        link = [linker, "-arch", "arm64", "-platform_version", "ios", min_os, "18.0", "-adhoc_codesign"]
        link += ["-o", f"{folder}/{EXECUTABLE}", f"{folder}/runner.o"]
        _run(compile_)
        _run(link + sorted(path.name for path in SOURCES.glob("*.tbd")))
        code = (Path(folder) / EXECUTABLE).read_bytes()
    version = _run([clang, "--version"]).splitlines()[0].strip()
    return AppTemplate(EXECUTABLE, code, None, {"PkgInfo": b"APPL????"}, version)


def _run(command: list[str]) -> str:
    try:
        done = run(command, Path(command[0]).name, limit_s=120, folder=SOURCES)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{Path(command[0]).name} did not end in 120 s") from error
    if done.returncode:
        raise ExportError(f"{Path(command[0]).name} failed: {done.stderr[-800:]}", where=SOURCES)
    return done.stdout


def of_app(app: Path) -> AppTemplate:
    """The user's runner app, an unpacked `.app` folder for arm64 iOS.

    Raises:
        InputError: not an app, or one with frameworks and extensions, whose code must be signed on macOS.
    """
    files = {name: path for name, path in walk(app) if not name.startswith("_CodeSignature/")}
    info = _info(files.get("Info.plist"), app)
    executable = str(info["CFBundleExecutable"])
    if executable not in files:
        raise InputError(f"the app lacks its executable {executable}", where=app)
    nested = [name for name in files if name.startswith(_NESTED)]
    content = {name: read_bytes(path, MOST_BYTES) for name, path in files.items()}
    code = content.pop(executable)
    nested += [name for name, data in content.items() if data.startswith(_MACHO)]
    if nested or any(name.startswith("Model/") for name in content):
        fix = "link frameworks statically, or use --format xcode and sign on macOS"
        raise InputError("the runner app holds code of its own besides its executable, or a Model folder",
                         where=", ".join(nested[:3]) or app, fix=fix)  # fmt: skip
    return AppTemplate(executable, code, str(info["CFBundleIdentifier"]), content)


def _info(path: Path | None, app: Path) -> dict[str, Any]:
    if path is None:
        raise InputError("the folder holds no Info.plist", where=app, fix="give an unpacked .app folder")
    return read_info(read_bytes(path), path)


def read_info(data: bytes, where: object) -> dict[str, Any]:
    """Info.plist with the two keys that signing needs.

    Raises:
        InputError: not a property list, or without them.
    """
    try:
        info = plistlib.loads(data)
    except (plistlib.InvalidFileException, ExpatError, ValueError, OverflowError, IndexError,
            TypeError, KeyError, RecursionError, OSError, AttributeError) as error:  # fmt: skip
        raise InputError(f"Info.plist cannot be read: {error}", where=where) from error
    keys = ("CFBundleExecutable", "CFBundleIdentifier")
    if not isinstance(info, dict) or not all(isinstance(info.get(k), str) and info[k] for k in keys):
        raise InputError(f"Info.plist lacks {' or '.join(keys)}", where=where)
    return info
