"""Code signatures of arm64 Mach-O executables: ad hoc, written and checked in pure Python.

Structures follow Apple's open source headers: mach-o/loader.h (load commands) and cs_blobs.h of xnu
(SuperBlob, CodeDirectory). A signature without a certificate ("ad hoc") binds code, Info.plist and the seal
of the resources by their hashes; iOS installs it only after it was signed again with a developer's
certificate.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from bluelm.errors import InputError

PAGE = 4096
SEGMENT_64, CODE_SIGNATURE = 0x19, 0x1D
_ARM64, _EXECUTE = 0x0100000C, 2
_HEADER = struct.Struct("<8I")
_ALIGN = 16384  # of __LINKEDIT's size in memory
_EMPTY = bytes(32)


@dataclass(frozen=True)
class Executable:
    """An executable split at its signature.

    Attributes:
        code: everything before the signature, with load commands that announce `signature_size` bytes.
        text: (file offset, size) of __TEXT.
    """

    code: bytes
    signature: bytes
    text: tuple[int, int]
    commands_end: int
    link_edit: int
    signature_command: int | None


def parse(data: bytes, where: object) -> Executable:
    """Find the code signature of a thin arm64 executable.

    Raises:
        InputError: another kind of file, a damaged one, or a signature that is not at its end.
    """
    try:
        return _parse(data, where)
    except struct.error as error:
        raise InputError("the executable's load commands are damaged", where=where) from error


def _parse(data: bytes, where: object) -> Executable:
    magic, cpu, _, kind, count, size, _, _ = _HEADER.unpack_from(data)
    if magic in (0xBEBAFECA, 0xBFBAFECA):
        raise InputError("a fat executable", where=where, fix="thin it: lipo -thin arm64")
    if (magic, cpu, kind) != (0xFEEDFACF, _ARM64, _EXECUTE) or count > 4096:
        raise InputError("not an arm64 executable for iOS", where=where)
    position, text, link_edit, signature = _HEADER.size, None, None, None
    for _ in range(count):
        command, length = struct.unpack_from("<II", data, position)
        if length < 8 or position + length > _HEADER.size + size:
            raise InputError("the executable's load commands are damaged", where=where)
        if command == SEGMENT_64:
            name = data[position + 8 : position + 24].rstrip(b"\0")
            _, _, offset, filled = struct.unpack_from("<4Q", data, position + 24)
            if name == b"__TEXT":
                text = (offset, filled)
            elif name == b"__LINKEDIT":
                link_edit = position
        elif command == CODE_SIGNATURE:
            signature = position
        position += length
    if text is None or link_edit is None:
        raise InputError("the executable has no __TEXT or no __LINKEDIT", where=where)
    start = len(data)
    if signature is not None:
        start, length = struct.unpack_from("<II", data, signature + 8)
        if start + length != len(data):
            raise InputError("the executable does not end with its signature", where=where)
    return Executable(data[:start], data[start:], text, position, link_edit, signature)


@dataclass(frozen=True)
class Identity:
    """What a signature binds besides the code."""

    identifier: str
    info_plist: bytes
    resources: bytes


def signature_size(identifier: str, code_size: int) -> int:
    """Bytes of the signature that `sign` writes, padded to 16."""
    return _padded(len(_super_blob(Identity(identifier, b"", b""), bytes(0), (0, 0), _pages(code_size))))


def _pages(size: int) -> int:
    return -(-size // PAGE)


def _padded(size: int) -> int:
    return -(-size // 16) * 16


def prepare(data: bytes, identifier: str, where: object) -> bytes:
    """The executable without its signature, with load commands that announce the new one.

    This is what a manifest can pin: it does not depend on the resources that the signature seals.

    Raises:
        InputError: there is no room for the load command.
    """
    found = parse(data, where)
    code = bytearray(found.code)
    code += bytes(_padded(len(code)) - len(code))
    command = found.signature_command
    if command is None:
        command = _add_command(code, found, where)
    size = signature_size(identifier, len(code))
    struct.pack_into("<4I", code, command, CODE_SIGNATURE, 16, len(code), size)
    (offset,) = struct.unpack_from("<Q", code, found.link_edit + 40)
    filled = len(code) + size - offset
    struct.pack_into("<Q", code, found.link_edit + 48, filled)
    struct.pack_into("<Q", code, found.link_edit + 32, -(-filled // _ALIGN) * _ALIGN)
    return bytes(code)


def _add_command(code: bytearray, found: Executable, where: object) -> int:
    """Append an LC_CODE_SIGNATURE, where zeros behind the load commands leave room for it."""
    position = found.commands_end
    if any(code[position : position + 16]) or position + 16 > found.text[0] + found.text[1]:
        raise InputError("the executable has no room for a code signature", where=where, fix="sign it once")
    count, size = struct.unpack_from("<II", code, 16)
    struct.pack_into("<II", code, 16, count + 1, size + 16)
    return position


def sign(prepared: bytes, identity: Identity, where: object) -> bytes:
    """A prepared executable with its ad hoc signature behind it."""
    found = _prepared(prepared, where)
    blob = _super_blob(identity, prepared, found, _pages(len(prepared)))
    return prepared + blob + bytes(_padded(len(blob)) - len(blob))


def _prepared(prepared: bytes, where: object) -> tuple[int, int]:
    """__TEXT of an executable whose signature is announced, but not there."""
    size = signature_announced(prepared, where)
    return parse(prepared + bytes(size), where).text


def signature_announced(prepared: bytes, where: object) -> int:
    """Bytes of signature that the load commands announce."""
    try:
        _, _, _, _, count, _, _, _ = _HEADER.unpack_from(prepared)
        position = _HEADER.size
        for _ in range(min(count, 4096)):
            command, length = struct.unpack_from("<II", prepared, position)
            if command == CODE_SIGNATURE:
                start, size = struct.unpack_from("<II", prepared, position + 8)
                if start == len(prepared) and size < 1 << 24:
                    return size
            position += length
    except struct.error as error:
        raise InputError("the executable's load commands are damaged", where=where) from error
    raise InputError("the executable announces no signature", where=where)


def _super_blob(identity: Identity, code: bytes, text: tuple[int, int], pages: int) -> bytes:
    """CodeDirectory (slot 0), empty requirements (slot 2), empty CMS (slot 0x10000)."""
    requirements = struct.pack(">3I", 0xFADE0C01, 12, 0)
    directory = _code_directory(identity, requirements, code, text, pages)
    blobs = ((0, directory), (2, requirements), (0x10000, struct.pack(">2I", 0xFADE0B01, 8)))
    offset = 12 + 8 * len(blobs)
    index, body = b"", b""
    for slot, blob in blobs:
        index += struct.pack(">2I", slot, offset + len(body))
        body += blob
    return struct.pack(">3I", 0xFADE0CC0, offset + len(body), len(blobs)) + index + body


def _code_directory(identity: Identity, requirements: bytes, code: bytes, text: tuple[int, int], pages: int) -> bytes:
    """CodeDirectory 0x20400: SHA-256 of each page, and before them of Info.plist, requirements, the seal."""
    name = identity.identifier.encode() + b"\0"
    special = [hashlib.sha256(part).digest() for part in (identity.resources, requirements, identity.info_plist)]
    hashes = [hashlib.sha256(code[i : i + PAGE]).digest() for i in range(0, len(code), PAGE)]
    hashes += [_EMPTY] * (pages - len(hashes))
    name_offset = 88
    hash_offset = name_offset + len(name) + 32 * len(special)
    length = hash_offset + 32 * pages
    ad_hoc, sha256, main_binary = 2, 2, 1
    head = struct.pack(
        ">9I4BI",
        0xFADE0C02, length, 0x20400, ad_hoc, hash_offset, name_offset, len(special), pages, len(code),
        32, sha256, 0, 12, 0,
    )  # fmt: skip
    tail = struct.pack(">3IQ3Q", 0, 0, 0, 0, text[0], text[1], main_binary)
    return head + tail + name + b"".join(special) + b"".join(hashes)


def cd_hash(signed: bytes, where: object) -> str:
    """The executable's CDHash as Apple's tools print it: 20 bytes of the CodeDirectory's SHA-256, in hex."""
    blob = parse(signed, where).signature
    try:
        _, _, count = struct.unpack_from(">3I", blob)
        for index in range(min(count, 16)):
            slot, offset = struct.unpack_from(">2I", blob, 12 + 8 * index)
            if slot == 0:
                (length,) = struct.unpack_from(">I", blob, offset + 4)
                return hashlib.sha256(blob[offset : offset + length]).hexdigest()[:40]
    except struct.error as error:
        raise InputError("the code signature is damaged", where=where) from error
    raise InputError("the code signature has no code directory", where=where)
