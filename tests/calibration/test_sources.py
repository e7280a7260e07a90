"""Reading calibration text: every shape that is accepted, and bad input."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from bluelm.errors import InputError, UnavailableError
from calibration.sources import MOST_BYTES, Document, read_texts

TURNS = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hello"}]


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_every_shape_is_read(tmp_path: Path) -> None:
    lines = write(
        tmp_path / "a.jsonl", {"text": "plain"}, {"prompt": "p", "response": "r", "id": 3}, {"messages": TURNS}
    )
    (tmp_path / "b.txt").write_text("﻿文字\n", encoding="utf-8")
    table = arrow.table({"prompt": ["q"], "response": ["s"], "score": [0.5]})
    parquet.write_table(table, tmp_path / "c.parquet")
    found = read_texts([lines, tmp_path / "b.txt", tmp_path / "c.parquet"])
    assert found.documents == (
        Document(text="plain"),
        Document(messages=({"role": "user", "content": "p"}, {"role": "assistant", "content": "r"})),
        Document(messages=tuple(TURNS)),
        Document(text="文字\n"),
        Document(messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "s"})),
    )


def test_tools_and_calls_are_kept(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    tool = {"type": "function", "function": {"name": "f"}}
    path = write(tmp_path / "a.jsonl", {"messages": [parts, call], "tools": [tool]}, {"messages": TURNS, "tools": []})
    first, second = read_texts([path]).documents
    assert first.messages == (parts, {key: call[key] for key in ("role", "tool_calls")})
    assert (first.content, first.tools, second.tools) == ("ab\n", (tool,), None)


def test_parquet_messages_and_nulls(tmp_path: Path) -> None:
    table = arrow.table({"messages": [TURNS, None], "text": [None, "t"]})
    parquet.write_table(table, tmp_path / "c.parquet")
    first, second = read_texts([tmp_path / "c.parquet"]).documents
    assert first.messages == tuple(TURNS)
    assert second.text == "t"


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name, text in (("b.txt", "two"), ("a.txt", "one"), ("inner/c.TXT", "three"), ("picture.png", "x")):
        (tmp_path / name).write_text(text)
    assert [document.text for document in read_texts([tmp_path]).documents] == ["one", "two", "three"]


def test_hash_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = read_texts([path]).sha256
    assert read_texts([path]).sha256 == before
    path.write_text("two")
    assert read_texts([path]).sha256 != before


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": " \n"}, {"text": "x"}, {"prompt": "", "response": ""}, {"messages": []})
    found = read_texts([path])
    assert (len(found.documents), found.empty) == (1, 3)


def junk() -> bytes:
    return random.Random(0).randbytes(4096)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\t", "no text"),
        ("a.txt", junk(), "UTF-8"),
        ("a.txt", "旧编码".encode("gb18030"), "iconv"),
        ("a.txt", b"text\0text", "zero bytes"),
        ("a.jsonl", b"", "no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2"),
        ("a.jsonl", b"[1, 2]\n", "not a JSON object"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
        ("a.jsonl", b'{"texts": "x"}\n', "found texts"),
        ("a.jsonl", b'{"text": 5}\n', "`text` must be text"),
        ("a.jsonl", b'{"prompt": "x"}\n', "found prompt"),
        ("a.jsonl", b'{"messages": "x"}\n', "must be a list"),
        ("a.jsonl", b'{"messages": [1]}\n', "`role` and `content`"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "`content` must be text"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": [1]}]}\n', "a part of `content`"),
        ("a.jsonl", b'{"messages": [], "tools": "x"}\n', "`tools` must be a list"),
        ("a.jsonl", b'{"messages": [], "tools": [1]}\n', "JSON schemas"),
        ("a.jsonl", b'{"text": "\xff"}\n', "UTF-8"),
        ("a.parquet", junk(), "parquet"),
        ("a.parquet", b"", "parquet"),
        ("a.csv", b"text\nx\n", "unknown kind"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_texts([path])
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "a.bin").write_bytes(junk())
    for paths, says in (
        ([tmp_path / "none.txt"], "no such"),
        ([tmp_path / "junk"], "has no .txt"),
        ([], "no calibration file"),
    ):
        with pytest.raises(InputError, match=says):
            read_texts(paths)


def test_folder_of_binary_junk_named_like_text_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.parquet"):
        (tmp_path / name).write_bytes(junk())
    with pytest.raises(InputError, match="UTF-8"):
        read_texts([tmp_path])


def test_far_too_much_text_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(InputError, match="a few MB"):
        read_texts([path])


def test_parquet_without_known_columns_is_refused(tmp_path: Path) -> None:
    parquet.write_table(arrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="none of the columns"):
        read_texts([tmp_path / "a.parquet"])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(arrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnavailableError, match=r"bluelm-export\[parquet\]"):
        read_texts([tmp_path / "a.parquet"])
