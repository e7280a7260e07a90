"""Hostile protobufs, whatever they stand for."""

from __future__ import annotations

from collections.abc import Callable

Change = Callable[[bytes], bytes]
MANY = 2_000_000


# --- any protobuf ----------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def inside(data: bytes, *fields: int) -> bytes:
    """The bytes as a message in messages, the outermost first."""
    for field in reversed(fields):
        data = varint(field << 3 | 2) + varint(len(data)) + data
    return data


def behind(data: bytes) -> Change:
    """What comes later in a protobuf is merged into what came before."""
    return lambda valid: valid + data


def nested(fields: tuple[int, ...], times: int, inner: tuple[int, ...]) -> bytes:
    """Messages in one another, so many times."""
    data = b""
    for _ in range(times):
        data = inside(data, *inner)
    return inside(data, *fields)


WIRE: dict[str, Change] = {
    "a varint without end": behind(b"\x08" + b"\xff" * 1_000_000),
    "a tag without end": behind(b"\xff" * 1_000_000),
    "a length of 2^63": behind(b"\x3a" + varint(2**63) + b"x"),
    "a length of 2 GB that is not there": behind(b"\x3a" + varint(2**31 - 1) + b"x"),
    "groups in groups": behind(b"\x0b" * 100_000),
    "a field of number 0": behind(b"\x02\x01x"),
    "2 MB of unknown fields": behind(inside(b"x", 15000) * 400_000),
    "many unknown numbers": behind(b"\x98\x75\x01" * 400_000),
}
