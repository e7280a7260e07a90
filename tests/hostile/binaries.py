"""Hostile safetensors, pickles, archives, tables and databases."""

from __future__ import annotations

import io
import json
import os
import pickle
import sqlite3
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.texts import DEEP, DIGITS, SHOUT

Change = Callable[[bytes], bytes]


# --- safetensors -----------------------------------------------------------------------------------------------------


def _header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Another header before the same data."""

    def do(valid: bytes) -> bytes:
        (size,) = struct.unpack_from("<Q", valid)
        header = json.loads(valid[8 : 8 + size])
        made = change(header)
        text = made if isinstance(made, bytes) else json.dumps(header if made is None else made).encode()
        return struct.pack("<Q", len(text)) + text + valid[8 + size :]

    return do


def _first(**values: Any) -> Change:
    """Other entries for the first tensor."""

    def change(header: dict[str, Any]) -> None:
        header[next(name for name in header if name != "__metadata__")].update(values)

    return _header(change)


def _renamed(name: str) -> Change:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        first = next(key for key in header if key != "__metadata__")
        return {name if key == first else key: value for key, value in header.items()}

    return _header(change)


def _length(number: int) -> Change:
    return lambda valid: struct.pack("<Q", number) + valid[8:]


SAFETENSORS: dict[str, Change] = {
    "a header of 2^63 bytes": _length(2**63),
    "a header of 2^64 - 1 bytes": _length(2**64 - 1),
    "a header of 90 MB that is not there": _length(90 << 20),
    "a header of no bytes": _length(0),
    "a header of one byte": _length(1),
    "a deep header": _header(lambda header: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "5000 digits in the header": _header(
        lambda header: f'{{"a": {{"dtype":"F32","shape":[{DIGITS}],"data_offsets":[0,4]}}}}'.encode()
    ),
    "a header of spaces": _header(lambda header: b" " * (20 << 20)),
    "a shape of 2^62": _first(shape=[2**62, 4]),
    "a shape whose product overflows": _first(shape=[2**32, 2**32]),
    "a negative shape": _first(shape=[-1, 4]),
    "a shape of 1000 axes": _first(shape=[1] * 1000),
    "an empty shape": _first(shape=[]),
    "offsets backwards": _first(data_offsets=[4, 0]),
    "offsets behind the end": _first(data_offsets=[0, 2**40]),
    "negative offsets": _first(data_offsets=[-4, 0]),
    "an unknown dtype": _first(dtype="F4096"),
    "a dtype that is a list": _first(dtype=["F32"]),
    "a name that shouts": _renamed(SHOUT),
    "a name of another place": _renamed("../../../x"),
    "a name of 1 MB": _renamed("x" * (1 << 20)),
    "100,000 empty tensors": _header(
        lambda header: {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    ),
    "metadata that is a list": _header(lambda header: {"__metadata__": [1]} | header),
    "overlapping tensors": _header(
        lambda header: {
            name: value if name == "__metadata__" else {**value, "data_offsets": [0, 4]}
            for name, value in header.items()
        }
    ),
}  # fmt: skip


# --- pickles and their archives --------------------------------------------------------------------------------------


class _Program:
    """Runs when it is read."""

    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def _pickle(value: Any, **how: Any) -> Change:
    """A torch file whose pickle is another."""

    def do(valid: bytes) -> bytes:
        data = value if isinstance(value, bytes) else pickle.dumps(value, 2)
        return _repacked(valid, lambda name, old: data if name.endswith("data.pkl") else old, **how)

    return do


def _repacked(valid: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(valid)) as archive, zipfile.ZipFile(out, "w", compression) as made:
        for name in archive.namelist():
            made.writestr(name, change(name, archive.read(name)))
    return out.getvalue()


def _zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Change:
    def do(valid: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", compression) as made:
            for name, data in entries.items():
                made.writestr(name, data)
        return out.getvalue()

    return do


def _added(name: str, data: bytes = b"x", compression: int = zipfile.ZIP_STORED) -> Change:
    def do(valid: bytes) -> bytes:
        out = io.BytesIO(valid)
        with zipfile.ZipFile(out, "a", compression) as made:
            made.writestr(name, data)
        return out.getvalue()

    return do


def _said_size(valid: bytes) -> bytes:
    """A directory that says 4 GB of its first entry."""
    at = valid.rfind(b"PK\x01\x02")
    return valid[: at + 20] + struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0) + valid[at + 28 :]


BOMB = bytes(64 << 20)
ZIPS: dict[str, Change] = {
    "a bomb": _zip({"x/data.pkl": BOMB, "Payload/a.app/x": BOMB, "AndroidManifest.xml": BOMB}),
    "an entry of another place": _added("../../../owned"),
    "an absolute entry": _added("/tmp/owned"),
    "an entry that shouts": _added("a\x1b[2J\n::error::x"),
    "an entry with a zero byte": _added("assets/a\x00b"),
    "a bomb beside what is valid": _added("assets/bomb", BOMB, zipfile.ZIP_DEFLATED),
    "a size of 4 GB": _said_size,
    "only the end of an archive": lambda valid: valid[-22:],
    "60,000 entries": _zip({f"assets/{i}": b"" for i in range(60_000)}, zipfile.ZIP_STORED),
}
PICKLES: dict[str, Change] = {
    "a program": _pickle(_Program()),
    "this process's secrets": _pickle(b"\x80\x02cos\nenviron\n."),
    "a program in an old file": lambda valid: pickle.dumps(_Program()),
    "a number": _pickle(1),
    "a list": _pickle([1, 2]),
    "a deep list": _pickle(b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."),
    "a text of 4 GB that is not there": _pickle(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 32) + b"x."),
    "a memo of 2^31": _pickle(b"\x80\x02]r\xff\xff\xff\x7f."),
    "nothing": _pickle(b""),
    "compressed": lambda valid: _repacked(valid, lambda name, data: data, zipfile.ZIP_DEFLATED),
    "a name of a module": _pickle(b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R."),
    **ZIPS,
}


# --- tables and databases --------------------------------------------------------------------------------------------


def _parquet(columns: Callable[[], dict[str, Any]], **how: Any) -> Change:
    def do(valid: bytes) -> bytes:
        import pyarrow
        import pyarrow.parquet

        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns()), out, **how)
        return out.getvalue()

    return do


def _one_word() -> dict[str, Any]:
    """A word of 1 MiB in a dictionary, meant 2000 times."""
    import pyarrow

    return {"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), ["x" * (1 << 20)])}


def _nested() -> Any:
    value: Any = "x"
    for _ in range(40):
        value = [value]
    return [value]


PARQUET: dict[str, Change] = {
    "2 GB from one word": _parquet(_one_word),
    "numbers as text": _parquet(lambda: {"text": [1, 2]}),
    "no rows": _parquet(lambda: {"text": []}),
    "another column": _parquet(lambda: {"tekst": ["a"]}),
    "nothing in it": _parquet(lambda: {"text": [None, None]}),
    "bytes as text": _parquet(lambda: {"text": [b"\xff\xfe", b"\x80"]}),
    "depth": _parquet(lambda: {"text": _nested()}),
    "turns that are none": _parquet(lambda: {"messages": [[{"role": "user"}], [{"role": None, "content": 1}]]}),
    "5,000 columns": _parquet(lambda: {f"c{i}": ["x"] for i in range(5000)}),
    "text that shouts": _parquet(lambda: {SHOUT: ["x"]}),
}

JSONL: dict[str, Change] = {
    "depth": lambda valid: b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}\n",
    "5000 digits": lambda valid: f'{{"text": {DIGITS}}}\n'.encode(),
    "half a pair": lambda valid: b'{"text": "a \\ud800 b"}\n',
    "a line of 30 MB without spaces": lambda valid: b'{"text": "' + b"x" * (30 << 20) + b'"}\n',
    "a million lines of nothing": lambda valid: b"\n" * 1_000_000,
    "a hundred thousand empty texts": lambda valid: b'{"text": ""}\n' * 100_000,
    "turns that are none": lambda valid: b'{"messages": [{"role": 1}]}\n',
    "turns in turns": lambda valid: b'{"messages": [[[{"role": "user", "content": "x"}]]]}\n',
    "no table": lambda valid: b"[1]\n",
    "zero bytes": lambda valid: b'{"text": "a\\u0000b"}\n\x00\x00',
    "returns alone": lambda valid: b'{"text": "a"}\r{"text": "b"}\r',
}


def _sqlite(*statements: str) -> Change:
    """The valid database with more done to it."""

    def do(valid: bytes) -> bytes:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "x.sqlite"
            path.write_bytes(valid)
            file = sqlite3.connect(path)
            for statement in statements:
                file.execute(statement)
            file.commit()
            file.close()
            return path.read_bytes()

    return do


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT"
SQLITE: dict[str, Change] = {
    "a view without end": _sqlite(
        "ALTER TABLE runs RENAME TO r",
        f"CREATE VIEW runs AS SELECT r.* FROM r, ({ENDLESS} x FROM c)",
    ),
    "a trigger": _sqlite("CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM runs; END"),
    "another version": _sqlite("PRAGMA user_version = 999999"),
    "a negative version": _sqlite("PRAGMA user_version = -5"),
    "a table away": _sqlite("DROP TABLE runs"),
    "a text of 50 MB": _sqlite("UPDATE runs SET title = CAST(zeroblob(50000000) AS TEXT)"),
    "a title that shouts": _sqlite("UPDATE runs SET title = char(27) || '[2J' || char(10) || '::error::x'"),
    "columns that are blobs": _sqlite("UPDATE runs SET title = x'ff', target = x'00'"),
    "no columns": _sqlite("DROP TABLE runs", "CREATE TABLE runs (x)"),
}
