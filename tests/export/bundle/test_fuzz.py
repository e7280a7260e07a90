"""A small share of benchmarks/fuzz.py at every run: damaged input costs an ExportError, never a traceback."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from bluelm.errors import ExportError
from tests.support import readers
from tests.support.limits import HANG_S
from tests.support.readers import LONG_TO_MAKE, READERS

INPUTS = int(os.environ.get("FUZZ_INPUTS", "25"))  # a reader
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("../../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def damage(data: st.DataObject, valid: bytes) -> bytes:
    """The valid input with a few changes: bits, cuts, insertions; or, of JSON, one value replaced by any other."""
    if valid.lstrip()[:1] in (b"{", b"[") and data.draw(st.booleans()):
        try:
            document = json.loads(valid)
        except ValueError:  # lines of JSON
            document = {}
        place(data, document)
        return json.dumps(document).encode()
    changed = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        kind = data.draw(st.sampled_from(["bit", "cut", "insert", "truncate"]))
        if kind == "bit" and changed:
            changed[start] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[start : start + data.draw(st.sampled_from([1, 4, 100]))]
        elif kind == "insert":
            changed[start:start] = data.draw(st.binary(max_size=16))
        else:
            del changed[start:]
    return bytes(changed)


def place(data: st.DataObject, document: Any) -> None:
    """Replace one value somewhere in a JSON document."""
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    if not keys:
        return None
    key = data.draw(st.sampled_from(keys))
    if isinstance(document[key], dict | list) and document[key] and data.draw(st.booleans()):
        return place(data, document[key])
    document[key] = data.draw(JSON)
    return None


QUICK = [name for name in READERS if name not in LONG_TO_MAKE]  # the others: tests/hostile


@pytest.mark.parametrize("name", QUICK)
def test_a_pipe_and_a_hole_in_place_of_a_file_are_refused(name: str, tmp_path: Path) -> None:
    """Nobody waits for the other end of a pipe; nobody reads 128 GB of nothing."""
    reader = READERS[name]()
    found: list[BaseException] = []

    def read(home: Path) -> None:
        try:
            reader.read(home)
        except BaseException as error:  # noqa: BLE001  (looked at below)
            found.append(error)

    for kind in ("pipe", "hole"):
        path = readers.fresh(reader, tmp_path / kind) / reader.target
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        else:
            with path.open("wb") as file:
                file.truncate(128 << 30)
        thread = threading.Thread(target=read, args=(tmp_path / kind,), daemon=True)
        thread.start()
        thread.join(HANG_S)
        assert not thread.is_alive(), f"{kind}: it waits for ever"
        error = found.pop() if found else None
        assert isinstance(error, ExportError) or (reader.mends and error is None), f"{kind}: {error!r}"


@pytest.mark.parametrize("name", QUICK)
def test_damaged_input_is_refused_or_read(name: str) -> None:
    reader = READERS[name]()

    with tempfile.TemporaryDirectory() as folder:
        home = readers.fresh(reader, Path(folder) / "home")
        assert readers.allowed(reader, home, reader.seed)

        @seed(1)
        @settings(
            max_examples=INPUTS,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(st.data())
        def run(data: st.DataObject) -> None:
            readers.allowed(reader, home, damage(data, reader.seed))

        run()
