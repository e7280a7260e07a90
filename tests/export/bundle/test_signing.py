"""The signing block of an APK, by the text of its specification, and archives that have none or another."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from bluelm.errors import InputError
from export.bundle import zip32
from export.bundle.android import signing as apk_signing
from export.bundle.android.signing import CHUNK, V2, V3, ChunkDigest, content_digest, signing_block
from tests.support import bundles

DATA = bytes(range(251)) * 14_000  # 3.35 chunks


def by_the_specification(*sections: bytes) -> bytes:
    """source.android.com, v2: 0xa5, the chunk's length, the chunk; then 0x5a, the number of chunks, their digests."""
    chunks = [section[at : at + 2**20] for section in sections for at in range(0, len(section), 2**20)]
    digests = [hashlib.sha256(b"\xa5" + len(chunk).to_bytes(4, "little") + chunk).digest() for chunk in chunks]
    return hashlib.sha256(b"\x5a" + len(chunks).to_bytes(4, "little") + b"".join(digests)).digest()


@pytest.mark.parametrize("sizes", [
    [len(DATA)], [CHUNK], [CHUNK] * 3 + [7], [5, 2 * CHUNK, CHUNK - 5, 1], [2 * CHUNK + 3, 2 * CHUNK - 3],
    [CHUNK - 1] * 3, [1] * 5, [], [0, CHUNK, 0, 1],
])  # fmt: skip
def test_chunks_are_those_of_the_bytes_however_they_come(sizes: list[int]) -> None:
    digest, at = ChunkDigest(), 0
    for size in sizes:
        digest.update(DATA[at : at + size])
        at += size
    tail = ChunkDigest()
    tail.update(b"the end")
    assert content_digest([digest, tail]) == by_the_specification(DATA[:at], b"the end")


def archive(path: Path, block: bytes) -> Path:
    """One stored file, then what should be a signing block."""
    contents = b"hello"
    entries = [zip32.Entry("a.txt", len(contents), zlib.crc32(contents))]
    layout = zip32.lay_out(entries, 4)
    directory = zip32.central_directory(entries, layout)
    body = b"".join(zip32.stream(entries, [zip32.BytesSource(contents)], 4))
    end = zip32.end_record(1, len(directory), layout.end + len(block))
    path.write_bytes(body + block + directory + end)
    return path


@pytest.mark.parametrize(("pairs", "said"), [
    (None, "has no signing block"), ([], "not signed by one signer"),
    ([(V2, bytes(1 << 20))], "has no signing block"),  # a megabyte at most
    ([(V2, bytes((1 << 20) - 45))], "block is damaged"), ([(V2, b"\1")], "block is damaged"),
    ([(V2, b""), (V3, b"")], "block is damaged"),
])  # fmt: skip
def test_archives_without_a_signing_block(pairs: Sequence[tuple[int, bytes]] | None, said: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.apk", b"" if pairs is None else signing_block(pairs))
    with pytest.raises(InputError, match=said):
        apk_signing.verify_apk(path, 4)


def test_one_scheme_alone_is_not_enough(tmp_path: Path) -> None:
    signing = bundles.development_keys(tmp_path).package
    path = tmp_path / "x.apk"
    entries = [zip32.Entry("a.txt", 5, zlib.crc32(b"hello"))]
    apk_signing.write_signed(path, entries, [zip32.BytesSource(b"hello")], 4, signing)
    _, certificate = apk_signing.verify_apk(path, 4)
    assert certificate == signing.certificate
    whole = zip32.read_zip(path, 4)
    with path.open("rb") as file:
        signers = apk_signing._read_block(file, whole)
    assert list(signers) == [V2, V3]
    for kept in (V2, V3):
        archive(path, signing_block([(kept, signers[kept].encode(kept))]))
        with pytest.raises(InputError, match="not signed by one signer with both v2 and v3"):
            apk_signing.verify_apk(path, 4)
