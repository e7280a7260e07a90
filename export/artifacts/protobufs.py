"""Protobufs from untrusted files, checked against bounds before protobuf makes objects of them.

Two bytes of a file can be an empty message of 270 bytes in memory, so that a file of 20 MB takes gigabytes. The wire
format is scanned once (https://protobuf.dev/programming-guides/encoding/): messages and fields are counted and lengths
are checked; protobuf itself interprets them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from bluelm.errors import InputError
from bluelm.system.reading import read_bytes

MOST_BYTES = 1 << 30  # weights lie in files of their own
MOST_MESSAGES = 640_000  # a Core ML program of 80 blocks has 0.5 million, an ONNX graph 27,000
EMPTY = 4  # messages that an empty one counts for: files of nothing else are given up sooner
FIELDS = 4  # times as many; a message has 1.6 to 5
MOST_UNKNOWN = 10_000  # fields that the schema has not: those of a newer one
VARINT, FIXED_64, LENGTH, FIXED_32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, are in none of the formats read here
LONGEST_VARINT = 10
UNKNOWN = object()

Fields = dict[int, Any]  # by number, the descriptor of the messages that the field holds, or None


def read_message(path: Path, message: Any, what: str, most: int = MOST_MESSAGES) -> Any:
    """The message that a file holds.

    Args:
        message: an empty one of its kind, which is filled.
        what: the file in words: "an ONNX file".
        most: messages in it.

    Raises:
        InputError: it is none, is damaged, or holds more than the bounds above.
    """
    data = read_bytes(path, MOST_BYTES, what)
    try:
        check(data, message.DESCRIPTOR, most)
        message.ParseFromString(data)
    except (ValueError, IndexError, DecodeError) as error:
        reason = "it ends too early" if isinstance(error, IndexError) else error
        raise InputError(f"not {what}: {reason}", where=path, fix="export it again") from None
    return message


def check(data: bytes, descriptor: Any, most: int = MOST_MESSAGES) -> None:
    """Count messages, fields and those that are unknown; an empty message counts for `EMPTY`.

    Raises:
        ValueError: there are too many, or a length or a type that no protobuf has.
        IndexError: it ends within a field.
    """
    kinds: dict[str, Fields] = {}
    waiting: list[tuple[int, int, Fields]] = [(0, len(data), _fields(descriptor, kinds))]
    messages = fields = unknown = 0
    while waiting:
        at, end, inner = waiting.pop()
        while at < end:
            fields += 1
            tag, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
            wire, kind = tag & 7, inner.get(tag >> 3, UNKNOWN)
            if kind is UNKNOWN:
                unknown += 1
            if wire == LENGTH:
                length, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
                if length > end - at:
                    raise ValueError(f"a field of {length} bytes where {end - at} are left")
                if kind is not None and kind is not UNKNOWN:
                    messages += 1 if length else EMPTY
                    waiting.append((at, at + length, _fields(kind, kinds)))
                at += length
            elif wire == VARINT:
                at = at + 1 if data[at] < 128 else _varint(data, at)[1]
            elif wire in (FIXED_32, FIXED_64):
                at += 4 if wire == FIXED_32 else 8
            else:
                raise ValueError(f"a field of the type {wire}")
            if fields > FIELDS * most or messages > most:
                raise ValueError(f"more than {most} messages or {FIELDS * most} fields")
            if unknown > MOST_UNKNOWN:
                raise ValueError(f"more than {MOST_UNKNOWN} unknown fields")
        if at != end:
            raise ValueError("a field goes beyond its message")


def _fields(descriptor: Any, known: dict[str, Fields]) -> Fields:
    name = descriptor.full_name
    if name not in known:
        known[name] = {number: field.message_type for number, field in descriptor.fields_by_number.items()}
    return known[name]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Its value, and where it ends."""
    value = 0
    for index in range(LONGEST_VARINT):
        byte = data[at + index]
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    raise ValueError(f"a number of more than {LONGEST_VARINT} bytes")
