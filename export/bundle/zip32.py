"""A canonical zip: stored entries, aligned data, fixed times, so that every byte follows from names and
contents.

Layout of one entry (PKWARE APPNOTE 4.3.7, alignment extra field 0xd935 of Android's zipalign):

    local header (30) | name | extra: 0xd935, size, alignment, zeros | data, starting at a multiple of the
    alignment

The reader accepts only what the writer writes: it rebuilds every header and compares, so there is no byte in
the file that neither the contents' digests nor the layout determine.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from bluelm.errors import InputError, TargetError
from bluelm.trust.paths import check_name

LIMIT = 2**32 - 1  # zip64 is refused by aapt2, zipalign and apksigner
PIECE = 1 << 20  # bytes read at a time

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_DOS_DATE = 0x21  # 1 January 1980: no time stamp in a bundle
_UNIX = 3 << 8


class Contents(Protocol):
    """Contents of one file, read in pieces: a file on disk, a part of one, or bytes."""

    @property
    def size(self) -> int: ...

    def pieces(self) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class BytesSource:
    """Contents held in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def pieces(self) -> Iterator[bytes]:
        yield self.data


@dataclass(frozen=True)
class FileSource:
    """`length` bytes of a file from `start`; the whole file when `length` is None."""

    path: Path
    start: int = 0
    length: int | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size - self.start if self.length is None else self.length

    def pieces(self) -> Iterator[bytes]:
        left = self.size
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                data = file.read(min(PIECE, left))
                if not data:
                    raise InputError("the file became shorter while it was read", where=self.path)
                left -= len(data)
                yield data


@dataclass(frozen=True)
class Entry:
    """One stored file of an archive.

    Attributes:
        name: path with forward slashes.
        size: bytes, stored uncompressed.
        crc: CRC-32 of the contents.
        mode: Unix permission bits; 0 leaves them out, as in an APK.
    """

    name: str
    size: int
    crc: int
    mode: int = 0


@dataclass(frozen=True)
class Places:
    """Where each entry's header and data begin, and where the last entry ends."""

    headers: tuple[int, ...]
    data: tuple[int, ...]
    end: int


def _encoded(name: str) -> tuple[bytes, int]:
    """The name's bytes and the flag that says UTF-8."""
    data = name.encode("utf-8")
    return data, 0 if name.isascii() else 0x800


def _extra(header_end: int, alignment: int) -> bytes:
    """Padding that moves the data to a multiple of `alignment`; at least the field's six bytes."""
    if alignment == 1:
        return b""
    padding = -(header_end + 6) % alignment
    return struct.pack("<HHH", 0xD935, 2 + padding, alignment) + bytes(padding)


def local_header(entry: Entry, offset: int, alignment: int) -> bytes:
    """Local file header at `offset`, its name and its padding."""
    name, flags = _encoded(entry.name)
    extra = _extra(offset + _LOCAL.size + len(name), alignment)
    fields = (
        0x04034B50,
        10,
        flags,
        0,
        0,
        _DOS_DATE,
        entry.crc,
        entry.size,
        entry.size,
        len(name),
        len(extra),
    )
    return _LOCAL.pack(*fields) + name + extra


def lay_out(entries: Sequence[Entry], alignment: int) -> Places:
    """Offsets of every entry.

    Raises:
        TargetError: the archive would need zip64.
    """
    headers, data, position = [], [], 0
    for entry in entries:
        headers.append(position)
        position += _LOCAL.size + len(_encoded(entry.name)[0])
        position += len(_extra(position, alignment))
        data.append(position)
        position += entry.size
        if position > LIMIT - (1 << 24) or len(entries) > 65534:
            raise TargetError("the archive passes 4 GiB or 65534 files: zip64 would be needed", where=entry.name)
    return Places(tuple(headers), tuple(data), position)


def central_directory(entries: Sequence[Entry], layout: Places) -> bytes:
    """The list of entries at the end of the archive."""
    out = bytearray()
    for entry, offset in zip(entries, layout.headers, strict=True):
        name, flags = _encoded(entry.name)
        made_by, attributes = (_UNIX | 20, (0o100000 | entry.mode) << 16) if entry.mode else (10, 0)
        sizes = (entry.crc, entry.size, entry.size, len(name))
        out += _CENTRAL.pack(0x02014B50, made_by, 10, flags, 0, 0, _DOS_DATE, *sizes, 0, 0, 0, 0, attributes, offset)
        out += name
    return bytes(out)


def end_record(count: int, directory_size: int, directory_offset: int) -> bytes:
    """End of central directory, without a comment."""
    return _END.pack(0x06054B50, 0, 0, count, count, directory_size, directory_offset, 0)


def stream(entries: Sequence[Entry], sources: Sequence[Contents], alignment: int) -> Iterator[bytes]:
    """Bytes of the entries' section, a piece at a time.

    Raises:
        InputError: a source's contents are not those that its entry describes.
    """
    layout = lay_out(entries, alignment)
    for entry, source, offset in zip(entries, sources, layout.headers, strict=True):
        yield local_header(entry, offset, alignment)
        size = crc = 0
        for piece in source.pieces():
            size, crc = size + len(piece), zlib.crc32(piece, crc)
            yield piece
        if (size, crc) != (entry.size, entry.crc):
            raise InputError("the file changed while it was packed", where=entry.name, fix="pack again")


def write_zip(path: Path, entries: Sequence[Entry], sources: Sequence[Contents], alignment: int = 1) -> None:
    """Write a whole archive; the caller gives a temporary path."""
    layout = lay_out(entries, alignment)
    directory = central_directory(entries, layout)
    with path.open("wb") as out:
        for piece in stream(entries, sources, alignment):
            out.write(piece)
        out.write(directory + end_record(len(entries), len(directory), layout.end))


@dataclass(frozen=True)
class Archive:
    """A canonical archive on disk.

    Attributes:
        entries: in file order.
        data: offset of each entry's contents, by name.
        entries_end: end of the last entry; a signing block may lie between it and the directory.
        directory: offset of the central directory.
        end: offset of the end record.
    """

    path: Path
    entries: tuple[Entry, ...]
    data: Mapping[str, int]
    entries_end: int
    directory: int
    end: int

    def source(self, name: str) -> FileSource:
        """Contents of one entry."""
        entry = self._by_name()[name]
        return FileSource(self.path, self.data[name], entry.size)

    def read(self, name: str, limit: int = 64 << 20) -> bytes:
        """Contents of a small entry.

        Raises:
            InputError: no such entry, or larger than `limit` bytes.
        """
        entry = self._by_name().get(name)
        if entry is None or entry.size > limit:
            problem = "is missing" if entry is None else f"has {entry.size} bytes, more than the {limit} read"
            raise InputError(f"{name} {problem}", where=self.path)
        return b"".join(self.source(name).pieces())

    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    def _by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}


def read_zip(path: Path, alignment: int = 1) -> Archive:
    """Read the directory of a canonical archive and check every header byte; contents are not read.

    Raises:
        InputError: truncated, compressed, zip64, misaligned, or a byte that the writer would not have
            written.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        directory, count, length, end = _read_end(file, size, path)
        file.seek(directory)
        raw = file.read(length)
        entries = tuple(_read_directory(raw, count, path))
        layout = lay_out(entries, alignment)
        if layout.end > directory or central_directory(entries, layout) != raw:
            raise InputError("the zip directory is not as this tool writes it: damaged or changed", where=path)
        for entry, offset in zip(entries, layout.headers, strict=True):
            header = local_header(entry, offset, alignment)
            file.seek(offset)
            if file.read(len(header)) != header:
                raise InputError(f"the zip header of {entry.name} is damaged or not aligned", where=path)
    data = {entry.name: offset for entry, offset in zip(entries, layout.data, strict=True)}
    return Archive(path, entries, data, layout.end, directory, end)


def _read_end(file: BinaryIO, size: int, path: Path) -> tuple[int, int, int, int]:
    """(directory offset, entries, directory bytes, offset of this record) from the file's last 22 bytes."""
    end = size - _END.size
    if end < 0:
        raise InputError(f"{size} bytes are not a zip archive: truncated?", where=path)
    file.seek(end)
    magic, disk, start, here, count, length, offset, comment = _END.unpack(file.read(_END.size))
    if magic != 0x06054B50 or (disk, start, comment) != (0, 0, 0) or here != count or offset + length != end:
        raise InputError("the zip end record is damaged, or the file was truncated or added to", where=path)
    return offset, count, length, end


def _read_directory(raw: bytes, count: int, path: Path) -> Iterable[Entry]:
    """Entries of a central directory; each field that the writer fixes is compared later, as a whole."""
    position, seen = 0, set[str]()
    for _ in range(count):
        if position + _CENTRAL.size > len(raw):
            raise InputError("the zip directory ends too early", where=path)
        fields = _CENTRAL.unpack_from(raw, position)
        method, crc, size, length, attributes = fields[4], fields[7], fields[9], fields[10], fields[15]
        position += _CENTRAL.size
        try:
            name = raw[position : position + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError("a name in the zip directory is not UTF-8", where=path) from error
        check_name(name, path)
        if method != 0:
            raise InputError(f"{name} is compressed: bundles of this tool store every file as it is", where=path)
        if name in seen:
            raise InputError(f"{name} is there twice", where=path)
        seen.add(name)
        position += length
        yield Entry(name, size, crc, (attributes >> 16) & 0o7777)
    if position != len(raw):
        raise InputError("the zip directory holds more than its entries", where=path)
