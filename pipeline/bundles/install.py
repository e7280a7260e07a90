"""Installs a bundle on a phone, after checking that the phone meets its requirements."""

from __future__ import annotations

import re
import shlex
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from bluelm.errors import InputError, TargetError, UnavailableError
from bluelm.system.progress import Progress, Silent
from export.bundle.manifest import BundleManifest, Requirements
from export.bundle.project import runtimes
from export.bundle.zip32 import read_zip
from targets.phones import devicectl, phone
from targets.phones.adb import Device, Server
from targets.phones.phone import Phone

REMOTE = "/data/local/tmp/bluelm-export"
_NEEDS = {"onnxruntime-qnn": ("QNN", "FastRPC")}  # any of these libraries of the system
_LAUNCHERS = "cmd package query-activities --brief -a android.intent.action.MAIN -c android.intent.category.LAUNCHER"
_CHAT = re.compile(r"(?:([\w.]+)/org\.bluelm\.chat|(org\.bluelm\.chat)/)\.MainActivity")
Apps = Mapping[str, Mapping[str, str]]  # package -> the runtime versions that it was built with


def objections(manifest: BundleManifest, found: Phone, apps: Apps | None = None) -> list[str]:
    """Why a phone cannot run a bundle: chip, system, memory, runtime; empty when it can.

    Args:
        apps: chat apps that are on the phone, as `chat_apps` gives them.
    """
    needs = manifest.requirements
    out: list[str] = []
    if needs.soc and not _same_chip(needs, found.soc):
        out.append(f"made for {needs.soc}, its chip is {found.soc or 'unknown'}")
    system = _version(found.system)
    if system is None or system < _numbers(needs.min_os):
        name = "Android API" if needs.os == "android" else "iOS"
        out.append(f"needs {name} {needs.min_os} or newer, it has {found.system or 'an unknown system'}")
    if found.memory is None or found.memory < needs.min_ram_bytes:
        has = "an unknown amount" if found.memory is None else f"{found.memory / 2**30:.1f} GiB"
        out.append(f"needs {needs.min_ram_bytes / 2**30:.1f} GiB of memory, it has {has}")
    libraries = _NEEDS.get(manifest.runtime.name, ())
    if libraries and not set(libraries) & set(found.runtimes):
        out.append(f"needs {' or '.join(libraries)} in the system, it has {', '.join(found.runtimes) or 'neither'}")
    return out + _app_objections(manifest, apps or {})


def _app_objections(manifest: BundleManifest, apps: Apps) -> list[str]:
    """What is wrong with the chat apps that would load this bundle; nothing if one of them is right.

    An app around another runtime does not count: it carries a model of its own.
    """
    libraries = {library.version_of for library in runtimes()[manifest.runtime.name].android}
    needed = {name: version for name, version in manifest.runtime.pinned.items() if name in libraries}
    out: list[str] = []
    for package, has in apps.items():
        if not needed or (has and not has.keys() & needed.keys()):
            continue
        wrong = [f"{n} {has.get(n, 'not at all')}" for n, version in needed.items() if has.get(n) != version]
        if not wrong:
            return []
        told = ", ".join(wrong) if has else "no word of its runtime"
        out.append(f"needs {_listed(needed)}, its chat app {package} has {told}")
    return out


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def chat_apps(device: Device) -> Apps:
    """The chat apps of our Gradle project on a phone, and the runtime versions in their version names.

    A version name is "1.0+onnxruntime=1.31.1"; nothing behind it: the app does not say.
    """
    found: dict[str, dict[str, str]] = {}
    for match in _CHAT.finditer(device.shell(_LAUNCHERS).stdout):
        package = match[1] or match[2]
        name = re.search(r"^\s*versionName=(\S+)", device.shell(f"dumpsys package {package}").stdout, re.MULTILINE)
        parts = name[1].split("+")[1:] if name else []
        found[package] = {part.partition("=")[0]: part.partition("=")[2] for part in parts if "=" in part}
    return found


def _same_chip(needs: Requirements, found: str) -> bool:
    return _plain(found) in {_plain(name) for name in (needs.soc or "", *needs.soc_aliases)}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _version(system: str) -> tuple[int, ...] | None:
    """(34,) of "Android 14 (API 34)", (18, 1) of "iOS 18.1"."""
    match = re.search(r"API ([0-9]{1,4})\b", system) or re.search(r"iOS ([0-9]{1,4}(?:\.[0-9]{1,4}){0,3})", system)
    return _numbers(match[1]) if match else None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def check(manifest: BundleManifest, found: Phone, apps: Apps | None = None) -> None:
    """
    Raises:
        TargetError: the phone is not one that the bundle was made for; every reason is given.
    """
    if reasons := objections(manifest, found, apps):
        fix = "choose another phone, or make a run for this one; a chat app is built anew with `bundle --format gradle`"
        raise TargetError(f"the bundle does not fit this phone: {'; '.join(reasons)}", where=found.serial, fix=fix)


def install(path: Path, manifest: BundleManifest, serial: str | None, progress: Progress | None = None) -> str:
    """Install a verified bundle; returns the serial of the phone.

    Raises:
        InputError: a format that is built first.
        UnavailableError: no phone, or it refuses.
        TargetError: the phone does not fit.
    """
    if manifest.format == "apk":
        return _android(path, manifest, serial, progress or Silent())
    if manifest.format == "ipa":
        return _apple(path, manifest, serial)
    fix = {"gradle": "./gradlew :app:installDebug", "xcode": "build and run it in Xcode"}.get(manifest.format)
    raise InputError(f"a {manifest.format} bundle is not installed as it is", where=path, fix=fix)


def _android(path: Path, manifest: BundleManifest, serial: str | None, progress: Progress) -> str:
    server = Server()
    ready = [d.serial for d in server.devices() if d.state == "device"]
    device = server.device(_choose(ready, serial))
    check(manifest, phone.ask(device), chat_apps(device))
    files = [path] if path.is_file() else sorted(path.glob("*.apk"))
    # The names in the package manager's session: a single APK's own may be anything, those of a set were checked.
    names = {file: "base.apk" if file == path else file.name for file in files}
    remote = f"{REMOTE}-{uuid.uuid4().hex[:8]}"
    device.check(f"mkdir -p {remote}")
    try:
        with progress.task("push", total=sum(file.stat().st_size for file in files)) as task:
            for file in files:
                device.push(file, f"{remote}/{names[file]}", advance=lambda count: task.advance(count))
        _package_manager(device, remote, names)
    finally:
        device.shell(f"rm -rf {remote}")
    return device.serial


def _package_manager(device: Device, remote: str, names: Mapping[Path, str]) -> None:
    """One install session over all APKs of the set, each by its name in the folder `remote` of the phone."""
    total = sum(file.stat().st_size for file in names)
    said = device.check(f"pm install-create -r -S {total}")
    session = re.search(r"\[(\d+)\]", said)
    if session is None:
        raise UnavailableError(f"the package manager opened no session: {said.strip()}", where=device.serial)
    try:
        for file, name in names.items():
            words = ("pm", "install-write", "-S", str(file.stat().st_size), session[1], name, f"{remote}/{name}")
            device.check(shlex.join(words), timeout=600)
        said = device.check(f"pm install-commit {session[1]}", timeout=600)
    except UnavailableError:
        device.shell(f"pm install-abandon {session[1]}")
        raise
    if "Success" not in said:
        raise UnavailableError(f"the package manager refuses it: {said.strip()[-300:]}", where=device.serial)


def _choose(ready: Sequence[str], serial: str | None) -> str:
    if serial is not None:
        return serial
    if not ready:
        raise UnavailableError("no phone is connected", fix="connect one with USB debugging on; see `adb devices`")
    if len(ready) > 1:
        raise InputError("several phones are connected", fix=f"name one with --serial: {', '.join(ready)}")
    return ready[0]


def _apple(path: Path, manifest: BundleManifest, serial: str | None) -> str:
    phones = {found.serial: found for found in devicectl.phones() if found.state == "device"}
    chosen = _choose(list(phones), serial)
    if chosen not in phones:
        raise UnavailableError(f"no device {chosen!r} is connected", fix=f"connected: {', '.join(phones) or 'none'}")
    check(manifest, phones[chosen])
    with tempfile.TemporaryDirectory() as folder:
        archive = read_zip(path)
        for entry in archive.entries:
            target = Path(folder) / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                out.writelines(archive.source(entry.name).pieces())
            target.chmod(entry.mode)
        app = next((Path(folder) / "Payload").iterdir())
        devicectl.devicectl("device", "install", "app", "--device", chosen, str(app), timeout=3600)
    return chosen
