"""Lines and rows: what ends a line, what is no text, and how much is read of what unpacks to far more."""

from __future__ import annotations

import json
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from calibration import rows, samples, sources
from calibration.rows import json_rows, parquet_rows
from calibration.samples import load_samples
from calibration.sources import read_texts
from eval import heldout
from eval.tasks.task_data import LocalData
from pipeline.cli import main
from tests.support.files import reader_files as valid

BREAKS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines cuts a line, and JSON does not (some escaped)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(demo_checkpoint())


def lines(folder: Path, *records: Any, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("mark", BREAKS)
def test_a_line_of_json_ends_at_a_line_feed_alone(mark: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = f"one{mark}two words and a half"
    path = lines(tmp_path, {"text": text}, {"text": "last"})
    assert [found.text for found in read_texts([path]).documents] == [text, "last"]
    assert heldout.load([path], tokenizer, length=64).texts == (text, "last")
    question = {"question": text, "answer": "7"}
    gsm8k = {"task": "gsm8k", "dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"}
    (tmp_path / "tasks").mkdir()
    lines(tmp_path / "tasks", question, question, name="test.jsonl")
    assert LocalData(tmp_path / "tasks").splits(gsm8k) == {"test": [question, question]}


def test_lines_are_numbered_as_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a\u2028b"}\r\n\r\n{"text": 5}\r\n'.encode())
    with pytest.raises(InputError, match="must be text") as error:
        read_texts([path])
    assert error.value.where == f"{path}, line 3"


def test_half_a_surrogate_pair_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 \\\\ud800"}\n{"messages": [{"role": "user", "content": "a\\uD83D b"}]}\n')
    with pytest.raises(InputError, match="U\\+D83D is half a character") as error:
        read_texts([path])
    assert error.value.where == f"{path}, line 2"
    path.write_text(path.read_text().split("\n")[0])
    assert read_texts([path]).documents[0].text == "😀 \\ud800"


def test_a_role_that_the_template_lacks_is_refused_whatever_is_sampled(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad = {"messages": [{"role": "user", "content": "x"}, {"role": "narrator", "content": "y"}]}
    late = {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}
    plain = [{"text": "Some words to fill a window with. " * 20}] * 40
    for record in (bad, late):
        path = lines(tmp_path, *plain, record)
        for seed in range(5):
            with pytest.raises(InputError, match="unknown role") as error:
                load_samples([path], tokenizer, 1, 8, seed)
            assert error.value.where == f"{path}, line 41"
        with pytest.raises(InputError, match="unknown role") as error:
            heldout.load([path], tokenizer)
        assert error.value.where == f"{path}, line 41"
    table = arrow.table({"messages": [plain and [{"role": "user", "content": "x"}], bad["messages"]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="narrator") as error:
        load_samples([tmp_path / "a.parquet"], tokenizer, 1, 8, 0)
    assert error.value.where == f"{tmp_path / 'a.parquet'}, row 1"


def test_what_unpacks_to_far_more_is_refused_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 times the same 100,000 characters: 2 GB in a file of a few kB. At most 64 MiB of it are looked at."""
    path = tmp_path / "a.parquet"
    same = arrow.DictionaryArray.from_arrays(arrow.array([0] * 20_000, arrow.int32()), arrow.array(["word " * 20_000]))
    parquet.write_table(arrow.table({"text": same}), path)
    assert path.stat().st_size < 1_000_000
    monkeypatch.setattr(sources, "MOST_BYTES", 64 * 2**20)
    tracemalloc.start()
    before = arrow.total_allocated_bytes()
    with pytest.raises(InputError, match="unpacks to more than 64 MiB"):
        read_texts([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20
    assert arrow.total_allocated_bytes() - before < 200 * 2**20


def test_what_says_that_it_unpacks_to_more_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["x" * 4_000_000 + str(i) for i in range(8)]}), path, use_dictionary=False)
    with pytest.raises(InputError, match="more than 8 MiB"):
        next(parquet_rows(path, ("text",), most=8 * 2**20))


class Counting(str):
    """Text that counts the characters that are copied out of it."""

    copied = 0

    def __getitem__(self, key: Any) -> str:
        found = super().__getitem__(key)
        Counting.copied += len(found)
        return found


def test_reading_lines_and_cutting_passages_copies_each_character_once(tmp_path: Path) -> None:
    """Twice the text is twice the work: what is copied is counted, not timed."""
    for size in (1000, 2000):
        Counting.copied = 0
        text = Counting('{"text": "some words"}\n' * size)
        assert sum(1 for _ in json_rows(text, tmp_path)) == size
        assert Counting.copied <= len(text)
    for size in (100_000, 200_000):
        Counting.copied = 0
        document = sources.Document(text=Counting("words and\n" * (size // 10)))
        assert sum(len(piece.text) for piece in samples._cut(document, 1000)) == size
        assert Counting.copied <= 2 * size


class CountingList(list):
    copied = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        CountingList.copied += len(found) if isinstance(found, list) else 1
        return found


def test_cutting_windows_copies_each_token_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = CountingList(range(10, 40_010))
    monkeypatch.setattr(heldout, "_encode", lambda *_: ([1], tokens))
    windows = heldout.pack([sources.Document(text="x")], "en", tokenizer, 64)
    assert sum(len(w.tokens) - 1 for w in windows) > 39_900
    assert CountingList.copied <= 40_000


@pytest.mark.parametrize("command", [["generate", "nowhere", "--prompt"], ["--target", "cpu", "--name"]])
def test_an_argument_that_is_no_text_is_said(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Bytes that are not UTF-8 reach a program as half surrogates."""
    with pytest.raises(SystemExit) as leaving:
        main([*command, b"caf\xe9".decode("utf-8", "surrogateescape")])
    assert leaving.value.code == 2
    said = capfd.readouterr().err
    assert "not text in UTF-8: caf\\udce9" in said


def test_a_prompt_on_standard_input_that_is_no_text_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_bytes("旧编码".encode("gb18030"))
    with (tmp_path / "prompt").open(encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        with pytest.raises(SystemExit) as leaving:
            main(["generate", "nowhere", "--prompt", "-"])
    assert leaving.value.code == 2
    assert "standard input" in capfd.readouterr().err


def test_bounds_of_a_batch() -> None:
    assert rows.BATCH_ROWS[0] * sources.MOST_BYTES > rows.BATCH_BYTES


def test_no_damaged_byte_ends_the_process(tmp_path: Path) -> None:
    """pyarrow aborts where statistics of a column are asked for that contradict each other."""
    whole, path = valid.parquet_bytes(), tmp_path / "a.parquet"
    for place in range(64, min(160, len(whole))):
        for value in (0, 8, 255):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with suppress(InputError):
                list(parquet_rows(path, ("text",)))
