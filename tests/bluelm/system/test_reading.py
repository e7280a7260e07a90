"""Files of settings that somebody else wrote: bounded in bytes, depth and digits, or a clear refusal."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from bluelm.errors import InputError
from bluelm.system.reading import MOST_DEPTH, check_regular, parse_json, read_bytes, read_json, read_text
from bluelm.system.yamlfiles import read_yaml
from bluelm.trust.manifest import FolderManifest
from eval.report import Report
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable
from export.gguf.reader import GgufFile
from export.lowering.ranges import Ranges

DIGITS = "9" * 5000


def nested(rows: int, first: str, row: str) -> str:
    """a, b, c, …, each made of ten of the one before."""
    names = [chr(ord("a") + i) for i in range(rows + 1)]
    lines = [row.format(name=name, ten=", ".join([f"*{below}"] * 10)) for below, name in pairwise(names)]
    return "\n".join([f"a: &a {first}", *lines])


YAML = {
    "5000 digits": (f"bits: {DIGITS}", "characters"),
    "a hexadecimal number without end": (f"bits: 0x{'f' * 100_000}", "characters"),
    "a number in base 60": (f"bits: 1{':1' * 400_000}", "characters"),
    "a number of 50 digits": ("bits: " + "9" * 50, "40 digits"),
    "a date by its tag": ("a: !!timestamp 2024-99-99", "not YAML"),
    "a tag that does not fit": ("a: !!bool maybe", "tag"),
    "an empty whole number": ('a: !!int ""', "tag"),
    "lists in lists": ("a: " + "[" * 300_000, "nesting"),
    "tables in tables": ("\n".join(" " * i + "a:" for i in range(900)), "brackets"),
    "aliases of aliases": (nested(20, "[1, 1]", "{name}: &{name} [{ten}]"), "values"),
    "an alias to itself": ("a: &a [*a]", "brackets"),
    "too many aliases": ("a: &a 1\nb: [" + "*a, " * 1200 + "1]", "aliases"),
    "merged keys": ("a: {" + ", ".join(f"k{i}: 1" for i in range(11_000)) + "}", "keys"),
    "a set": ("a: !!set {b}", "set"),
    "bytes": ("a: !!binary aGk=", "bytes"),
    "code": ("a: !!python/object/apply:os.getcwd []", "constructor"),
    "too many values": ("- 1\n" * 200_000, "values"),
    "too many bytes": ("#" * (2 << 20), "2097152"),
    "no UTF-8": ("a: \udcff", "UTF-8"),
}
JSON = {
    "5000 digits": (f'{{"a": {DIGITS}}}', "5000 digits"),
    "10^400": ('{"lora_alpha": 1' + "0" * 400 + "}", "401 digits"),
    "lists in lists": ('{"a": ' + "[" * 300_000, "deep"),
    "as deep as Python goes": ('{"a": ' + "[" * 900 + "]" * 900 + "}", "brackets"),
    "millions of lists": ('{"a": [' + "[]," * 5_000_000 + "1]}", "values"),
    "too many bytes": (" " * (17 << 20), "bytes"),
    "no object": ("[1]", "object"),
    "cut": ('{"a": ', "JSON"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_without_bounds_is_refused(tmp_path: Path, name: str) -> None:
    text, word = YAML[name]
    (tmp_path / "r.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(InputError, match=word) as caught:
        read_yaml(tmp_path / "r.yaml")

    assert "r.yaml" in str(caught.value.where)


@pytest.mark.parametrize("name", JSON)
def test_json_without_bounds_is_refused(tmp_path: Path, name: str) -> None:
    text, word = JSON[name]
    (tmp_path / "c.json").write_text(text)

    with pytest.raises(InputError, match=word) as caught:
        read_json(tmp_path / "c.json")

    assert "c.json" in str(caught.value.where)


def test_what_is_usual_is_read(tmp_path: Path) -> None:
    """Dates are text, anchors and merges work, a byte order mark is no part of the text."""
    (tmp_path / "r.yaml").write_text("a: &a {x: 1, y: 2.5}\nb: {<<: *a, y: [yes, null]}\nc: 2024-99-99\n")
    assert read_yaml(tmp_path / "r.yaml") == {
        "a": {"x": 1, "y": 2.5},
        "b": {"x": 1, "y": [True, None]},
        "c": "2024-99-99",
    }
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"a": 1000000000000000019884624838656, "b": [1e3]}')
    assert read_json(tmp_path / "c.json") == {"a": int(1e30), "b": [1000.0]}
    deepest = "[" * (MOST_DEPTH - 1) + "]" * (MOST_DEPTH - 1)
    assert parse_json(deepest, "here") is not None


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    for reader in (read_json, read_yaml, read_text, read_bytes):
        with (tmp_path / "sparse").open("wb") as file:
            file.truncate(128 << 30)
        with pytest.raises(InputError, match="137438953472"):
            reader(tmp_path / "sparse")


@pytest.mark.parametrize("reader", [read_json, read_yaml, read_text, read_bytes])
def test_a_pipe_a_device_and_a_folder_are_no_files(tmp_path: Path, reader) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        found: list[str] = []

        def read(path: Path = path, found: list[str] = found) -> None:
            with pytest.raises(InputError) as caught:
                reader(path)
            found.append(caught.value.problem)

        thread = threading.Thread(target=read, daemon=True)  # one that blocks may not hold up the others
        thread.start()
        thread.join(60)
        assert found == ["this is not a regular file"]
    with pytest.raises(InputError, match="No such file"):
        reader(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot be read"):
        reader(tmp_path / "a\0b")


@pytest.mark.parametrize("reader", [check_regular, EmbeddingTable.open, GgufFile])
def test_libraries_do_not_wait_at_a_pipe(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        reader(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("reader", "name", "list_"),
    [
        (Report.read, "report.json", "stages"),
        (lambda path: Artifact.open(path.parent), "artifact.json", "files"),
        (Ranges.load, "ranges.json", "values"),
        (FolderManifest.open, "manifest.json", "files"),
    ],
)
def test_a_million_wrong_values_are_not_told_one_by_one(
    tmp_path: Path, reader: Callable[[Path], object], name: str, list_: str
) -> None:
    """pydantic makes an error of each: 700 MB and 11 s for a file of 2 MB."""
    path = tmp_path / name
    path.write_text(f'{{"{list_}": [{"0," * 1_000_000}0]}}')
    with pytest.raises(InputError, match="more than 100000 values"):
        reader(path)
    path.write_text(f'{{"{list_}": [{"0," * 1000}0]}}')
    with pytest.raises(InputError) as caught:
        reader(path)
    assert len(str(caught.value)) < 1000
