"""Hostile data of tasks (CSV, packed lines) and records that a run keeps, each made of a valid one."""

from __future__ import annotations

import gzip
import zlib
from functools import cache
from typing import Any

from tests.hostile.binaries import JSONL, Change
from tests.hostile.texts import SHOUT, json_changed

ROW = b'0,"anatomy?",a,b,c,d,A\n'


def _plain(data: bytes) -> Change:
    return lambda valid: data


CSV: dict[str, Change] = {
    "a quote that never ends": lambda valid: valid + b'0,"' + b"x" * (20 << 20),
    "a cell of 20 MB": lambda valid: valid + b'0,"' + b"x" * (20 << 20) + b'",a,b,c,d,A\n',
    "quotes in quotes": lambda valid: valid + b'0,"' + b'""' * (1 << 20) + b'",a,b,c,d,A\n',
    "a million empty lines": lambda valid: valid + b"\n" * 1_000_000,
    "a million commas": lambda valid: valid + b"," * 1_000_000 + b"\n",
    "a hundred thousand rows": lambda valid: valid + ROW * 100_000,
    "a hundred thousand columns": _plain(b"Question," * 100_000 + b"\n" + ROW),
    "headings that are one": _plain(b",Question,Question,Question,A,A,A\n" + ROW),
    "zero bytes": lambda valid: valid.replace(b",", b"\x00,"),
    "returns alone": lambda valid: valid.replace(b"\n", b"\r"),
    "no UTF-8": lambda valid: valid + b'0,"\xff\xfe",a,b,c,d,A\n',
    "answers that are none": lambda valid: valid.replace(b",A", b",E").replace(b",B", b",AB"),
    "no answers": lambda valid: valid.replace(b",A", b",").replace(b",B", b","),
    "text that shouts": lambda valid: valid + f'0,"{SHOUT}",a,b,c,d,"{SHOUT}"\n'.encode(),
}


def _packed(change: Change) -> Change:
    return lambda valid: gzip.compress(change(gzip.decompress(valid)), 1)


@cache
def _bomb() -> bytes:
    """Half a gigabyte of nothing."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([packer.compress(bytes(1 << 24)) for _ in range(32)] + [packer.flush()])


GZIPPED: dict[str, Change] = {
    **{name: _packed(change) for name, change in JSONL.items()},
    "half a gigabyte": lambda valid: _bomb(),
    "a thousand parts": lambda valid: valid * 1000,
    "ten thousand empty parts": lambda valid: gzip.compress(b"") * 10_000,
    "packed twice": lambda valid: gzip.compress(valid),
    "another sum": lambda valid: valid[:-8] + bytes(8),
    "a header without end": lambda valid: b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * (1 << 20),
}


def _file(name: str, entry: Any) -> Change:
    return json_changed(lambda document: document["files"].update({name: entry}))


RECORDS: dict[str, Change] = {
    "a file of another place": _file("../../../etc/passwd", [1, "x"]),
    "a file from the root": _file("/etc/passwd", [1, "x"]),
    "a name that shouts": _file(SHOUT, [1, "x"]),
    "a size that is none": _file("a.txt", [-1, "x"]),
    "a digest that is none": _file("a.txt", [5, None]),
    "no files": json_changed(lambda document: document.update(files={})),
    "another fingerprint": json_changed(lambda document: document.update(fingerprint="0" * 64)),
    "inputs that shout": json_changed(lambda document: document.update(inputs={SHOUT: SHOUT}, fingerprint="0")),
    "no fingerprint": json_changed(lambda document: document.pop("fingerprint")),
    "a hundred thousand files": json_changed(
        lambda document: document["files"].update({f"f{i}": [1, "x"] for i in range(100_000)})
    ),
}
