"""What can lie where a file is expected, whatever its format; and bytes that are odd in every one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

Make = Callable[[Path, bytes], None]
"""Puts something in place of a file, whose valid bytes are given too."""
SPARSE = 128 << 30


def _bytes(change: Callable[[bytes], bytes]) -> Make:
    return lambda path, valid: _write(path, change(valid))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _folder(path: Path, valid: bytes) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path, valid: bytes) -> None:
    path.unlink()
    os.mkfifo(path)


def _sparse(path: Path, valid: bytes) -> None:
    os.truncate(path, SPARSE)


def _sparse_zeros(path: Path, valid: bytes) -> None:
    path.write_bytes(b"")
    os.truncate(path, SPARSE)


def _link(target: str) -> Make:
    def make(path: Path, valid: bytes) -> None:
        path.unlink()
        path.symlink_to(target.format(name=path.name))

    return make


def _line(size: int) -> Make:
    return _bytes(lambda valid: b"a" * size)


ANY: dict[str, Make] = {
    "nothing in it": _bytes(lambda valid: b""),
    "a folder": _folder,
    "a pipe": _pipe,
    "sparse, 128 GB behind what is valid": _sparse,
    "sparse, 128 GB of zeros": _sparse_zeros,
    "a link to itself": _link("{name}"),
    "a link to /dev/zero": _link("/dev/zero"),
    "a link to /dev/stdin": _link("/dev/stdin"),
    "random bytes": _bytes(lambda valid: random.Random(0).randbytes(4096)),
    "one letter, 20 MB": _line(20 << 20),
    "UTF-16": _bytes(lambda valid: valid.decode("latin-1").encode("utf-16")),
    "zeros of its length": _bytes(lambda valid: bytes(len(valid))),
    "twice": _bytes(lambda valid: valid + valid),
    "ones in its first 16 bytes": _bytes(lambda valid: b"\xff" * 16 + valid[16:]),
    "half of it": _bytes(lambda valid: valid[: len(valid) // 2]),
}
