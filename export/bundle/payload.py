"""The payload: the signed folder that every bundle carries, whatever wraps it.

    <artifact files> · tokenizer · LICENSES/ · manifest.json · mlbom.cdx.json · signer.pem · model.sig

manifest.json holds the digest of every file but those four; model.sig signs every file but itself.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from bluelm.errors import InputError
from bluelm.trust import signature
from bluelm.trust.manifest import Difference, raise_differences
from bluelm.trust.paths import check_name
from export.bundle import keys, mlbom
from export.bundle.manifest import (
    CERTIFICATE,
    FILE,
    MLBOM,
    SIGNATURE,
    BundleManifest,
    File,
    Signing,
    SplitPiece,
)
from export.bundle.zip32 import BytesSource, Contents, FileSource

OWN = (FILE, MLBOM, CERTIFICATE, SIGNATURE)
NAME = "bundle"  # the signed folder's name, the same for every bundle


@dataclass(frozen=True)
class Keys:
    """The key of the package's own signature, and the elliptic curve key of model.sig; often the same."""

    package: keys.SigningKey
    model: keys.SigningKey

    @property
    def model_private(self) -> ec.EllipticCurvePrivateKey:
        if not isinstance(self.model.private, ec.EllipticCurvePrivateKey):
            fix = "add an elliptic curve key with --model-key; the RSA key then signs the package alone"
            raise InputError("model signatures need an elliptic curve key, and the key is RSA", fix=fix)
        return self.model.private


@dataclass(frozen=True)
class PayloadPart:
    """A run of bytes of one payload file, as one container entry: its place in the file and its CRC-32."""

    start: int
    size: int
    crc: int


@dataclass(frozen=True)
class Content:
    """One payload file, read once: its digests, and the CRC-32 of each part that it will be stored in.

    SHA-1 is there because the seal of an iOS app still names it beside SHA-256.
    """

    path: str
    role: str
    source: Contents
    sha256: str
    sha1: bytes
    parts: tuple[PayloadPart, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def part_source(self, part: PayloadPart) -> Contents:
        if isinstance(self.source, FileSource):
            return FileSource(self.source.path, self.source.start + part.start, part.size)
        return BytesSource(b"".join(self.source.pieces())[part.start : part.start + part.size])


def measure(path: str, role: str, source: Contents, cuts: Sequence[int] = ()) -> Content:
    """Read a source once.

    Args:
        cuts: sizes of the parts; empty for one part.
    """
    check_name(path)
    digest, old = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    sizes = list(cuts) or [source.size]
    crcs, filled = [0] * len(sizes), [0] * len(sizes)
    index = 0
    for piece in source.pieces():
        digest.update(piece)
        old.update(piece)
        view = memoryview(piece)
        while len(view):
            while filled[index] == sizes[index]:
                index += 1
            take = min(len(view), sizes[index] - filled[index])
            crcs[index] = zlib.crc32(view[:take], crcs[index])
            filled[index] += take
            view = view[take:]
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    parts = tuple(PayloadPart(start, size, crc) for start, size, crc in zip(starts, sizes, crcs, strict=True))
    return Content(path, role, source, digest.hexdigest(), old.digest(), parts)


def of_bytes(path: str, role: str, data: bytes) -> Content:
    return measure(path, role, BytesSource(data))


@dataclass(frozen=True)
class Payload:
    """Contents in the order of their paths, and the manifest among them."""

    manifest: BundleManifest
    contents: tuple[Content, ...]

    @property
    def bytes(self) -> int:
        return sum(content.size for content in self.contents)


Pieces = Callable[[Content], tuple[SplitPiece, ...]]


def assemble(
    draft: BundleManifest,
    contents: Sequence[Content],
    signing: Keys,
    container: Mapping[str, str] | None = None,
    pieces: Pieces = lambda _: (),
) -> Payload:
    """Finish the manifest, derive the bill of materials, sign.

    Args:
        draft: everything but `files` and `container`.
        container: SHA-256 of the files that the package has around the payload.
        pieces: where the parts of a file will lie, when it is split.

    Raises:
        InputError: a content that claims one of the payload's own names.
    """
    taken = [content.path for content in contents if content.path in OWN]
    if taken or len({content.path for content in contents}) != len(contents):
        raise InputError("two files of the bundle have the same name", where=", ".join(taken) or None)
    files = {c.path: File(role=c.role, bytes=c.size, sha256=c.sha256, pieces=pieces(c)) for c in contents}
    manifest = draft.model_copy(update={"files": files, "container": dict(container or {})})
    own = [
        of_bytes(FILE, "manifest", manifest.encode()),
        of_bytes(MLBOM, "bill of materials", mlbom.encode(manifest)),
        of_bytes(CERTIFICATE, "certificate", signing.model.certificate_pem),
    ]
    signed = {content.path: content.sha256 for content in (*contents, *own)}
    raw = signature.sign(NAME, signed, signing.model_private)
    whole = (*contents, *own, of_bytes(SIGNATURE, "signature", raw))
    return Payload(manifest, tuple(sorted(whole, key=lambda content: content.path)))


def signing_of(certificate: x509.Certificate, package: x509.Certificate | None) -> Signing:
    """The manifest's `signing`, from the certificate of model.sig and that of the package's own signature."""
    return Signing(
        subject=keys.subject(certificate),
        certificate_sha256=keys.fingerprint(certificate),
        development_key=keys.is_development(certificate),
        package_certificate_sha256=keys.fingerprint(package) if package else None,
    )


@dataclass(frozen=True)
class CheckedPayload:
    """A payload whose every byte was checked.

    Attributes:
        sources: its files.
        certificate: of the key that made model.sig.
        package: of the key that made the package's own signature, where the format has one.
    """

    manifest: BundleManifest
    sources: Mapping[str, Contents]
    certificate: x509.Certificate
    package: x509.Certificate | None

    @property
    def signers(self) -> tuple[x509.Certificate, ...]:
        """The certificates whose keys signed; what the manifest says of them counts nowhere."""
        return tuple(dict.fromkeys(c for c in (self.certificate, self.package) if c is not None))


def verify(
    sources: Mapping[str, Contents],
    container: Mapping[str, str],
    where: Path,
    package: x509.Certificate | None = None,
) -> CheckedPayload:
    """Check a payload: manifest against content, bill of materials, signature over everything.

    Args:
        sources: every file of the payload by its path.
        container: SHA-256 of every file around it.
        package: the certificate of the package's own signature, which was checked already.

    Raises:
        InputError: what differs, file by file.
    """
    lacking = [name for name in OWN if name not in sources]
    if lacking:
        raise InputError(f"the bundle lacks {', '.join(lacking)}", where=where)
    manifest = BundleManifest.decode(_read(sources[FILE], FILE), where)
    certificate = keys.load_certificate(_read(sources[CERTIFICATE], CERTIFICATE), where)
    for name in OWN:
        check_size(sources[name], name)
    found = {path: _measured(path, source, manifest) for path, source in sorted(sources.items())}
    _compare(manifest, found, container, where)
    if mlbom.encode(manifest) != _read(sources[MLBOM], MLBOM):
        raise InputError("mlbom.cdx.json does not follow from the manifest: changed", where=where)
    if manifest.signing != signing_of(certificate, package):
        raise InputError("the manifest names another signer than the certificates that signed", where=where)
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise InputError("signer.pem holds no elliptic curve key", where=where)
    signed = {path: content.sha256 for path, content in found.items() if path != SIGNATURE}
    signature.verify_exact(_read(sources[SIGNATURE], SIGNATURE), NAME, signed, public)
    return CheckedPayload(manifest, sources, certificate, package)


def _measured(path: str, source: Contents, manifest: BundleManifest) -> Content:
    """`measure`, but that a file of another size than the manifest's is not read: it may have any."""
    listed = manifest.files.get(path)
    if path in OWN or (listed is not None and listed.bytes == source.size):
        return measure(path, "", source)
    check_name(path)
    return Content(path, "", source, "", b"", (PayloadPart(0, source.size, 0),))


def _compare(manifest: BundleManifest, found: Mapping[str, Content], container: Mapping[str, str], where: Path) -> None:
    out: list[Difference] = []
    for path in sorted({*manifest.container, *container}):
        if path not in manifest.container:
            out.append(Difference(path, "added", "not in manifest.json"))
        elif path not in container:
            out.append(Difference(path, "missing", "in manifest.json, but not there"))
        elif manifest.container[path] != container[path]:
            out.append(Difference(path, "changed", "not the SHA-256 of manifest.json"))
    for path in sorted({*manifest.files, *found} - set(OWN)):
        old, new = manifest.files.get(path), found.get(path)
        if old is None:
            out.append(Difference(path, "added", "not in manifest.json"))
        elif new is None:
            out.append(Difference(path, "missing", "in manifest.json, but not there"))
        elif (old.bytes, old.sha256) != (new.size, new.sha256):
            out.append(Difference(path, "changed", "not the SHA-256 of manifest.json"))
    raise_differences(out, where)


def check_size(source: Contents, name: str, limit: int = 64 << 20) -> None:
    """Raises InputError: a file has more bytes than any bundle's of its kind."""
    if source.size > limit:
        raise InputError(f"{name} has {source.size} bytes, more than any bundle's", where=name)


def _read(source: Contents, name: str) -> bytes:
    check_size(source, name)
    return b"".join(source.pieces())
