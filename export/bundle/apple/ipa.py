"""An IPA: Payload/<name>.app with the payload in Model/, sealed and signed ad hoc.

Such an IPA must be signed again with a developer's certificate before an iPhone installs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bluelm.errors import InputError, TargetError
from bluelm.system.files import atomic_file
from export.bundle import payload
from export.bundle.apple import macho
from export.bundle.manifest import FILE, BundleManifest
from export.bundle.runner import AppTemplate, read_info
from export.bundle.seal import SEAL, Sealed, code_resources, info_plist
from export.bundle.zip32 import BytesSource, Contents, Entry, read_zip, write_zip

HOME = "Model/"
LIMIT = 4 * 10**9 - 2**26  # an app must stay below 4 GB uncompressed
NOTE = (
    "ad hoc signature: sign it again before installing, e.g. on macOS with `codesign -f -s IDENTITY "
    "--entitlements FILE Payload/*.app`, or with a service that signs IPAs again"
)


@dataclass(frozen=True)
class App:
    """The files around the payload; `code` announces a signature that is not there yet."""

    executable: str
    identifier: str
    code: bytes
    files: dict[str, bytes]

    def container(self) -> dict[str, str]:
        """SHA-256 of each file; of the executable, of what lies before its signature."""
        return {
            name: hashlib.sha256(data).hexdigest() for name, data in {**self.files, self.executable: self.code}.items()
        }


def app_of(runner: AppTemplate, draft: BundleManifest) -> App:
    """The app before the payload is known."""
    files = dict(runner.files)
    identifier = runner.identifier
    if identifier is None:
        identifier = draft.application.id
        files["Info.plist"] = info_plist(draft, runner.executable)
    code = macho.prepare(runner.code, identifier, runner.executable)
    return App(runner.executable, identifier, code, files)


def write(whole: payload.Payload, app: App, out: Path) -> Path:
    """Write `out`.ipa, all or nothing.

    Raises:
        TargetError: the app would pass Apple's limit.
    """
    total = whole.bytes + len(app.code) + sum(map(len, app.files.values()))
    if total > LIMIT:
        fix = "use --format xcode and let the app fetch the model (Background Assets)"
        raise TargetError(f"the app would hold {total} bytes, Apple allows 4 GB", where=out, fix=fix)
    resources = code_resources(_sealed(whole, app.files))
    identity = macho.Identity(app.identifier, app.files["Info.plist"], resources)
    files: dict[str, Contents] = {name: BytesSource(data) for name, data in app.files.items()}
    files[SEAL] = BytesSource(resources)
    files[app.executable] = BytesSource(macho.sign(app.code, identity, app.executable))
    own = {name: payload.measure(name, "", source).parts[0].crc for name, source in files.items()}
    crcs = own | {HOME + content.path: content.parts[0].crc for content in whole.contents}
    files |= {HOME + content.path: content.source for content in whole.contents}
    prefix = f"Payload/{whole.manifest.name}.app/"
    names = sorted(files)
    entries = [Entry(prefix + n, files[n].size, crcs[n], _mode(n, app.executable)) for n in names]
    target = out.with_name(f"{out.name}.ipa")
    with atomic_file(target) as temporary:
        write_zip(temporary, entries, [files[name] for name in names])
    return target


def _mode(name: str, executable: str) -> int:
    return 0o755 if name == executable else 0o644


def _sealed(whole: payload.Payload, files: Mapping[str, bytes]) -> dict[str, Sealed]:
    sealed = {name: Sealed(hashlib.sha1(data).digest(), hashlib.sha256(data).digest()) for name, data in files.items()}
    for content in whole.contents:
        sealed[HOME + content.path] = Sealed(content.sha1, bytes.fromhex(content.sha256))
    return sealed


def verify(path: Path) -> payload.CheckedPayload:
    """Check an IPA: archive, manifest and model signature, seal, code signature.

    Raises:
        InputError: what is wrong, and where.
    """
    archive = read_zip(path)
    if archive.directory != archive.entries_end:
        raise InputError("bytes lie between the archive's entries and its directory", where=path)
    home = "/".join(archive.names()[0].split("/")[:2]) + "/" if archive.names() else ""
    if not (home.startswith("Payload/") and home.endswith(".app/")):
        raise InputError("not an IPA: it must hold Payload/<name>.app", where=path)
    files = {name.removeprefix(home): archive.source(name) for name in archive.names() if name.startswith(home)}
    if len(files) != len(archive.names()) or not {"Info.plist", SEAL, HOME + FILE} <= set(files):
        raise InputError("the IPA holds files outside its app, or lacks its seal or manifest", where=path)
    app, signed = _split(files, path)
    sources = {name.removeprefix(HOME): source for name, source in files.items() if name.startswith(HOME)}
    opened = payload.verify(sources, app.container(), path)
    manifest = opened.manifest
    contents = tuple(payload.measure(name, "", source) for name, source in sources.items())
    resources = code_resources(_sealed(payload.Payload(manifest, contents), app.files))
    if b"".join(files[SEAL].pieces()) != resources:
        raise InputError("the seal CodeResources does not match the app's files", where=path)
    identity = macho.Identity(app.identifier, app.files["Info.plist"], resources)
    if macho.sign(app.code, identity, path) != signed:
        raise InputError("the executable's code signature is not valid for this app", where=path)
    expected = {f"Payload/{manifest.name}.app/{name}": _mode(name, app.executable) for name in files}
    if {entry.name: entry.mode for entry in archive.entries} != expected:
        raise InputError("a file's name or permissions are not as they were written", where=path)
    return opened


def _split(files: Mapping[str, Contents], path: Path) -> tuple[App, bytes]:
    """The app without payload and seal, and its signed executable."""
    around = {name: source for name, source in files.items() if not name.startswith(HOME) and name != SEAL}
    if sum(source.size for source in around.values()) > 512 << 20:
        raise InputError("the app's own files are larger than any runner's", where=path)
    content = {name: b"".join(source.pieces()) for name, source in around.items()}
    info = read_info(content["Info.plist"], path)
    executable = str(info["CFBundleExecutable"])
    if executable not in content:
        raise InputError(f"the app lacks its executable {executable}", where=path)
    signed = content.pop(executable)
    code = macho.parse(signed, path).code
    return App(executable, str(info["CFBundleIdentifier"]), code, content), signed
