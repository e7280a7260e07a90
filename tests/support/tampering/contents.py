"""Tampering with the bytes of a file, the entries of an archive and the files of a folder."""

from __future__ import annotations

import io
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from typing import Any

from tests.support.tampering.case import WEIGHTS, Case

# --- bytes of a file -------------------------------------------------------------------------------------------------


def _bytes(change: Callable[[bytearray, random.Random], None]) -> Callable[[Case], None]:
    """A change of the bytes of one of the files, an archive being one file."""

    def do(case: Case) -> None:
        path = case.draw.choice([file for file in case.files if file.stat().st_size > 1])
        before = path.read_bytes()
        data = bytearray(before)
        while bytes(data) == before:
            change(data, case.draw)
        path.write_bytes(data)

    return do


def _structure(change: Callable[[bytearray, random.Random], None]) -> Callable[[Case], None]:
    """The same outside the weights, which are most of an archive."""

    def do(case: Case) -> None:
        path = case.draw.choice(case.files)
        raw, weights = path.read_bytes(), WEIGHTS["artifact/weights.bin"]
        at = raw.find(weights[:4096])
        head, tail = (raw, b"") if at < 0 else (raw[:at], raw[at + len(weights) :])
        part = bytearray(head if not tail or case.draw.random() < 0.3 else tail)
        before = bytes(part)
        while bytes(part) == before:
            change(part, case.draw)
        if at < 0:
            path.write_bytes(part)
        elif before == head:
            path.write_bytes(bytes(part) + raw[at:])
        else:
            path.write_bytes(raw[: at + len(weights)] + bytes(part))

    return do


def flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _set(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] = draw.randrange(256)


def _insert(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data) + 1)
    data[at:at] = draw.randbytes(draw.choice((1, 2, 4, 100, 16384)))


def _cut(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    del data[at : at + draw.choice((1, 2, 4, 100))]


def _truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def _append(data: bytearray, draw: random.Random) -> None:
    data += draw.choice((b"\0", b"\n", b" ", draw.randbytes(22), bytes(4096)))


def _zeros(data: bytearray, draw: random.Random) -> None:
    at, size = draw.randrange(len(data)), draw.choice((4, 64, 512))
    data[at : at + size] = bytes(len(data[at : at + size]))


def _move(data: bytearray, draw: random.Random) -> None:
    size = draw.choice((1, 16, 256))
    a, b = draw.randrange(len(data)), draw.randrange(len(data))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


# --- entries of an archive -------------------------------------------------------------------------------------------


def _entries(change: Callable[[dict[str, bytes], random.Random], None], **how: Any) -> Callable[[Case], None]:
    """Unpack, change, pack again with another tool, which computes every length and checksum anew."""

    def do(case: Case) -> None:
        path = case.draw.choice(case.files)
        with zipfile.ZipFile(path) as archive:
            held = {info.filename: archive.read(info) for info in archive.infolist()}
        change(held, case.draw)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", how.get("compression", zipfile.ZIP_STORED)) as archive:
            for name, data in held.items():
                archive.writestr(zipfile.ZipInfo(name, (1981, 1, 1, 1, 1, 2)), data)
        path.write_bytes(out.getvalue())

    return do


def _drop(held: dict[str, bytes], draw: random.Random) -> None:
    del held[draw.choice(list(held))]


def _add(held: dict[str, bytes], draw: random.Random) -> None:
    held[draw.choice(("assets/extra", "classes.dex", "lib/arm64-v8a/x.so", "Payload/x.app/y", "META-INF/A.SF"))] = b"x"


def _rename_entry(held: dict[str, bytes], draw: random.Random) -> None:
    name = draw.choice(list(held))
    held[f"{name}x"] = held.pop(name)


def _exchange(held: dict[str, bytes], draw: random.Random) -> None:
    a, b = draw.sample(list(held), 2)
    held[a], held[b] = held[b], held[a] + (b"x" if held[a] == held[b] else b"")


def _shuffle(held: dict[str, bytes], draw: random.Random) -> None:
    items = list(held.items())
    draw.shuffle(items)
    held.clear()
    held |= items


def _nothing(held: dict[str, bytes], draw: random.Random) -> None:
    """The same entries: packed anew, the package's own signature is gone."""


def _comment(case: Case) -> None:
    with zipfile.ZipFile(case.draw.choice(case.files), "a") as archive:
        archive.comment = case.draw.randbytes(8)


def _append_entry(case: Case) -> None:
    """Appended as zip tools append: in place of the directory, without touching what is there."""
    with zipfile.ZipFile(case.draw.choice(case.files), "a") as archive:
        archive.writestr(case.draw.choice(("assets/more", "Payload/bluelm-demo.app/more", archive.namelist()[0])), "x")


# --- files of a folder -----------------------------------------------------------------------------------------------


def _remove(case: Case) -> None:
    case.draw.choice(case.files).unlink()


def _rename(case: Case) -> None:
    path = case.draw.choice(case.files)
    path.rename(path.with_name(case.draw.choice((f"{path.name}2", f".{path.name}", path.name.upper() + "_"))))


def _lay_in(case: Case) -> None:
    folders = [case.path, *(p for p in case.path.rglob("*") if p.is_dir())]
    name = case.draw.choice(("extra.txt", ".hidden", "model.sig.bak", ".gitattributes", "weights.bin.part1", "a/b/c"))
    path = case.draw.choice(folders) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case.draw.choice((b"", b"x", bytes(1000))))


def _link(case: Case) -> None:
    path = case.draw.choice(case.files)
    target = path.with_name("elsewhere")
    if case.draw.random() < 0.5:  # the same contents, but behind a link
        path.rename(case.path.parent / "elsewhere")
        path.symlink_to(case.path.parent / "elsewhere")
    else:
        target.symlink_to("/etc/passwd")


def _swap_files(case: Case) -> None:
    a, b = case.draw.sample(case.files, 2)
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one if one != other else one + b"x")


def _pipe(case: Case) -> None:
    path = case.draw.choice(case.files)
    path.unlink()
    os.mkfifo(path)


def _splits(case: Case) -> None:
    """A split away, twice, or under another's name."""
    path = case.draw.choice([file for file in case.files if file.name != "base.apk"])
    match case.draw.randrange(3):
        case 0:
            path.unlink()
        case 1:
            shutil.copyfile(path, path.with_name("split_more.apk"))
        case _:
            path.rename(path.with_name("split_model77.apk"))
