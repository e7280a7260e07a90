"""APK Signature Schemes v2 and v3: sign a canonical archive, and verify it.

The format is that of source.android.com/docs/security/features/apksigning/v2 and /v3: between the entries
and the central directory lies a block with, per scheme, digests of the whole file in chunks of 1 MiB, signed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cryptography import x509

from bluelm.errors import InputError
from bluelm.trust import certificates
from export.bundle import keys, zip32

V2, V3 = 0x7109871A, 0xF05368C0
MAGIC = b"APK Sig Block 42"
CHUNK = 1 << 20
V3_FROM, V3_TO = 28, 0x7FFFFFFF
# In v2's signed data: "a v3 signature stood here too", so that stripping v3 is noticed.
_STRIPPING_PROTECTION = struct.pack("<II", 0xBEEFF00D, 3)


class ChunkDigest:
    """SHA-256 of each MiB of one section, then of all: fed piece by piece."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._piece = bytearray()

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            if not self._piece and len(view) >= CHUNK:
                self._finish(view[:CHUNK])
                view = view[CHUNK:]
                continue
            take = CHUNK - len(self._piece)
            self._piece += view[:take]
            view = view[take:]
            if len(self._piece) == CHUNK:
                self._finish(self._piece)
                self._piece = bytearray()

    def _finish(self, chunk: memoryview | bytearray) -> None:
        digest = hashlib.sha256(b"\xa5" + struct.pack("<I", len(chunk)))
        digest.update(chunk)
        self._chunks.append(digest.digest())

    def chunks(self) -> list[bytes]:
        """Digests of the section's chunks; the last may be shorter."""
        if self._piece:
            self._finish(self._piece)
            self._piece = bytearray()
        return self._chunks


def content_digest(sections: Sequence[ChunkDigest]) -> bytes:
    """Digest of all sections: entries, central directory, end record."""
    chunks = [chunk for section in sections for chunk in section.chunks()]
    return hashlib.sha256(b"\x5a" + struct.pack("<I", len(chunks)) + b"".join(chunks)).digest()


def _prefixed(*parts: bytes) -> bytes:
    """The parts as one length-prefixed field."""
    data = b"".join(parts)
    return struct.pack("<I", len(data)) + data


@dataclass(frozen=True)
class Signer:
    """What a scheme's block says of its one signer."""

    algorithm: int
    digest: bytes
    certificate: bytes
    public_key: bytes
    signature: bytes

    def signed_data(self, scheme: int) -> bytes:
        """The bytes that are signed."""
        digests = _prefixed(_prefixed(struct.pack("<I", self.algorithm), _prefixed(self.digest)))
        certificates = _prefixed(_prefixed(self.certificate))
        if scheme == V2:
            return digests + certificates + _prefixed(_prefixed(_STRIPPING_PROTECTION))
        return digests + certificates + struct.pack("<II", V3_FROM, V3_TO) + _prefixed()

    def encode(self, scheme: int) -> bytes:
        """The scheme's value in the signing block: a sequence of one signer."""
        range_ = b"" if scheme == V2 else struct.pack("<II", V3_FROM, V3_TO)
        signatures = _prefixed(_prefixed(struct.pack("<I", self.algorithm), _prefixed(self.signature)))
        data = _prefixed(self.signed_data(scheme))
        return _prefixed(_prefixed(data, range_, signatures, _prefixed(self.public_key)))


def _sign(digest: bytes, key: keys.SigningKey, scheme: int) -> Signer:
    certificate = key.certificate.public_bytes(keys.serialization.Encoding.DER)
    draft = Signer(key.algorithm, digest, certificate, key.public_der, b"")
    signature = key.sign(draft.signed_data(scheme))
    return Signer(key.algorithm, digest, certificate, key.public_der, signature)


def signing_block(pairs: Sequence[tuple[int, bytes]]) -> bytes:
    """The block of (scheme, value) pairs that lies in front of the central directory."""
    body = b"".join(struct.pack("<QI", 4 + len(value), id_) + value for id_, value in pairs)
    size = struct.pack("<Q", len(body) + 8 + len(MAGIC))
    return size + body + size + MAGIC


def write_signed(
    path: Path,
    entries: Sequence[zip32.Entry],
    sources: Sequence[zip32.Contents],
    alignment: int,
    key: keys.SigningKey,
) -> None:
    """Write an archive signed with v2 and v3 in one pass over the contents; the caller gives a temporary
    path.
    """
    layout = zip32.lay_out(entries, alignment)
    directory = zip32.central_directory(entries, layout)
    contents = ChunkDigest()
    with path.open("wb") as out:
        for piece in zip32.stream(entries, sources, alignment):
            contents.update(piece)
            out.write(piece)
        digest = _whole_digest(contents, directory, len(entries), layout.end)
        pairs = [(scheme, _sign(digest, key, scheme).encode(scheme)) for scheme in (V2, V3)]
        block = signing_block(pairs)
        out.write(block + directory)
        out.write(zip32.end_record(len(entries), len(directory), layout.end + len(block)))


def _whole_digest(contents: ChunkDigest, directory: bytes, count: int, block: int) -> bytes:
    """Digest over the three sections; the end record is taken as pointing at the signing block."""
    tail = ChunkDigest(), ChunkDigest()
    tail[0].update(directory)
    tail[1].update(zip32.end_record(count, len(directory), block))
    return content_digest((contents, *tail))


def verify_apk(path: Path, alignment: int) -> tuple[zip32.Archive, x509.Certificate]:
    """Check structure, alignment, both signatures and the digest of every byte.

    Returns:
        The archive and its signer's certificate.

    Raises:
        InputError: what is wrong, and with which part.
    """
    archive = zip32.read_zip(path, alignment)
    with path.open("rb") as file:
        signers = _read_block(file, archive)
        digest = _file_digest(file, archive)
    certificates = {signer.certificate for signer in signers.values()}
    if set(signers) != {V2, V3} or len(certificates) != 1:
        raise InputError("the APK is not signed by one signer with both v2 and v3", where=path)
    certificate = _check_signer(signers[V2], V2, path)
    for scheme, signer in signers.items():
        _check_signer(signer, scheme, path)
        if signer.digest != digest:
            raise InputError("the APK's contents do not match its signature: changed after signing", where=path)
    return archive, certificate


def _check_signer(signer: Signer, scheme: int, path: Path) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(signer.certificate)
        certificates.read_all(certificate)
        algorithm = keys.algorithm_of(certificate)
        info = certificate.public_key().public_bytes(
            keys.serialization.Encoding.DER, keys.serialization.PublicFormat.SubjectPublicKeyInfo
        )
    except keys.UNREADABLE as error:
        raise InputError(f"the signer's certificate cannot be read: {error}", where=path) from error
    if signer.public_key != info or signer.algorithm != algorithm:
        raise InputError("the signing block names another key than its certificate", where=path)
    if not keys.verify_signature(certificate, signer.signature, signer.signed_data(scheme)):
        raise InputError("the APK's signature is not valid", where=path)
    return certificate


def _file_digest(file: BinaryIO, archive: zip32.Archive) -> bytes:
    contents = ChunkDigest()
    file.seek(0)
    left = archive.entries_end
    while left:
        data = file.read(min(CHUNK, left))
        left -= len(data)
        contents.update(data)
    file.seek(archive.directory)
    directory = file.read(archive.end - archive.directory)
    return _whole_digest(contents, directory, len(archive.entries), archive.entries_end)


def _read_block(file: BinaryIO, archive: zip32.Archive) -> dict[int, Signer]:
    """Signers by scheme; the block must be byte for byte what encoding them again gives."""
    size = archive.directory - archive.entries_end
    if not 0 < size <= 1 << 20:
        raise InputError("the APK has no signing block", where=archive.path)
    file.seek(archive.entries_end)
    raw = file.read(size)
    try:
        signers = {id_: _decode(value, id_) for id_, value in _pairs(raw[8:-24])}
    except struct.error as error:
        raise InputError("the APK signing block is damaged", where=archive.path) from error
    if signing_block([(id_, signer.encode(id_)) for id_, signer in signers.items()]) != raw:
        raise InputError("the APK signing block is damaged", where=archive.path)
    return signers


def _pairs(body: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(body):
        length, id_ = struct.unpack_from("<QI", body, position)
        yield id_, body[position + 12 : position + 8 + length]
        position += 8 + length


def _field(data: bytes, position: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<I", data, position)
    return data[position + 4 : position + 4 + length], position + 4 + length


def _inner(data: bytes, depth: int) -> bytes:
    """The content of the first of `depth` nested length-prefixed fields."""
    for _ in range(depth):
        data, _ = _field(data, 0)
    return data


def _decode(value: bytes, scheme: int) -> Signer:
    """The first signer, the first digest, the first certificate; encoding again shows whether there was
    more.
    """
    signer = _inner(value, 2)
    data, position = _field(signer, 0)
    if scheme == V3:
        position += 8
    signatures, position = _field(signer, position)
    public_key, _ = _field(signer, position)
    digests, position = _field(data, 0)
    certificates, _ = _field(data, position)
    record, signature = _inner(digests, 1), _inner(signatures, 1)
    (algorithm,) = struct.unpack_from("<I", record)
    return Signer(algorithm, _field(record, 4)[0], _inner(certificates, 1), public_key, _field(signature, 4)[0])
