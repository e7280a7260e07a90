"""The history: nothing is lost, nothing is seen half, whoever writes at the same time."""

from __future__ import annotations

import math
import multiprocessing
import os
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bluelm.errors import InputError
from eval.history import History, KeptRun, MlflowHistory, default_path, names
from eval.measurement import Measurement
from tests.support.history_writers import FIGURES, PROCESSES, THREADS, make_run, write_many


def test_two_hundred_concurrent_writers_lose_nothing_and_no_reader_sees_half_a_run(tmp_path):
    path = tmp_path / "history.sqlite"  # does not exist: they also race to make it
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(PROCESSES * THREADS)
    writers = [context.Process(target=write_many, args=(str(path), p, start)) for p in range(PROCESSES)]
    for writer in writers:
        writer.start()
    looks = 0
    while any(writer.is_alive() for writer in writers):
        for run in History(path).runs():
            assert len(run.measurements) == FIGURES
            assert {m.value for m in run.measurements} == {float(run.facts["number"])}
        looks += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    runs = History(path).runs()
    assert looks > 0
    assert sorted(run.facts["number"] for run in runs) == list(range(PROCESSES * THREADS))
    assert [run.id for run in runs] == list(range(1, PROCESSES * THREADS + 1))


def test_a_writer_that_dies_in_the_middle_leaves_nothing(tmp_path):
    history = History(tmp_path / "h.sqlite")
    history.append(make_run("good"))
    bad = make_run("bad")
    object.__setattr__(bad.measurements[-1], "unit", None)  # NOT NULL: the last row fails
    with pytest.raises(InputError, match="NOT NULL"):
        history.append(bad)
    assert [run.title for run in history.runs()] == ["good"]
    assert sqlite3.connect(history.path).execute("SELECT count(*) FROM figures").fetchone() == (FIGURES,)


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=25)
@given(
    value=st.floats(),
    error=st.none() | finite,
    low=st.none() | finite,
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20),
    passed=st.booleans(),
)
def test_what_goes_in_comes_out(tmp_path_factory, value, error, low, text, passed):
    history = History(tmp_path_factory.mktemp("h") / "h.sqlite")
    figure = Measurement("kl", value, "nats/token", "estimated", error, None, text, "npu", low, None)
    history.append(KeptRun(text, "t", passed, (figure,), {"recipe": {"bits": 4}, "文": text}, time="2026-01-01"))
    (back,) = history.runs()
    (found,) = back.measurements
    assert (back.title, back.passed, back.accepted, back.time) == (text, passed, passed, "2026-01-01")
    assert back.facts == {"recipe": {"bits": 4}, "文": text}
    assert math.isnan(found.value) if math.isnan(value) else found.value == value
    assert (found.error, found.low, found.high, found.n, found.note) == (error, low, None, None, text)


def test_filters_order_and_the_last_accepted_run(tmp_path):
    history = History(tmp_path / "h.sqlite")
    for number, (title, passed) in enumerate([("a", True), ("b", True), ("a", True), ("a", False)]):
        history.append(KeptRun(title, "t", passed, (Measurement("x", number, "", "measured", subject="cpu"),)))
    assert [run.measurements[0].value for run in history.runs(title="a")] == [0, 2, 3]
    assert [run.measurements[0].value for run in history.runs(last=2)] == [2, 3]
    assert names(history.runs()) == [("x", "cpu")]
    best = history.last_accepted("a")
    assert best is not None and best.id == 3
    history.accept(3, False)
    again = history.last_accepted("a")
    assert again is not None and again.id == 1
    assert history.last_accepted("c") is None
    with pytest.raises(InputError, match="no run 99"):
        history.accept(99)


def test_no_history_yet_is_empty_and_is_not_made_by_reading(tmp_path):
    path = tmp_path / "none.sqlite"
    assert History(path).runs() == []
    assert not path.exists()


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to look like one" * 20, b""])
def test_a_file_that_is_no_history_is_told_and_left_alone(tmp_path, content):
    path = tmp_path / "h.sqlite"
    path.write_bytes(content)
    with pytest.raises(InputError):
        History(path).append(make_run("x"))
    with pytest.raises(InputError):
        History(path).runs()
    assert path.read_bytes() == content


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("BLUELM_EXPORT_HISTORY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "bluelm-export" / "history.sqlite"
    monkeypatch.setenv("BLUELM_EXPORT_HISTORY", str(tmp_path / "own"))
    assert default_path() == tmp_path / "own"


def test_mlflow_keeps_the_same_figures(monkeypatch, tmp_path):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    history = MlflowHistory.from_environment()
    assert history is not None
    figures = (
        Measurement("decode_tokens_per_s@512", 42.5, "tokens/s", "measured", subject="host", low=40.0, high=45.0),
        Measurement("mean_kl", 0.004, "nats/token", "measured", 0.001, subject="npu"),
    )
    number = history.append(KeptRun("demo", "snapdragon", False, figures, {"configuration": {"context": 512}}))
    found = MlflowClient(tracking_uri=history.uri).get_run(number)
    assert found.data.metrics == {
        "host/decode_tokens_per_s_at_512": 42.5,
        "host/decode_tokens_per_s_at_512.low": 40.0,
        "host/decode_tokens_per_s_at_512.high": 45.0,
        "npu/mean_kl": 0.004,
        "npu/mean_kl.error": 0.001,
    }
    assert found.data.params == {"context": "512"}
    assert found.data.tags["passed"] == "false" and found.info.status == "FAILED"


@pytest.mark.parametrize(
    "planted",
    [
        "CREATE VIEW more AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
        "CREATE TRIGGER later AFTER INSERT ON runs BEGIN UPDATE runs SET passed = 1; END",
        "ALTER TABLE runs ADD COLUMN much TEXT AS (printf('%.*c', 1000000000, 'x'))",
        "DROP TABLE figures; CREATE VIEW figures AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT 1 AS run, 'a' AS name, 1.0 AS value, '' AS unit, 'measured' AS how, NULL AS error, NULL AS n, "
        "'' AS note, '' AS subject, NULL AS low, NULL AS high, '' AS \"by\" FROM n",
    ],
)
def test_what_another_hand_planted_is_not_run(tmp_path, planted):
    """A view without an end was read for ever."""
    history = History(tmp_path / "h.sqlite")
    history.append(make_run("one"))
    with sqlite3.connect(history.path) as file:
        file.executescript(planted)
    for use in (history.check, history.runs, lambda: history.append(make_run("two"))):
        with pytest.raises(InputError, match=r"history cannot be used: (it holds a|runs holds a computed column)"):
            use()


@pytest.mark.parametrize("suffix", ["", "-wal", "-journal"])
def test_a_pipe_is_no_history(tmp_path, suffix):
    history = History(tmp_path / "h.sqlite")
    if suffix:
        history.append(make_run("one"))
    os.mkfifo(tmp_path / f"h.sqlite{suffix}")
    with pytest.raises(InputError, match=f"h.sqlite{suffix} is not a regular file"):
        history.check()


def test_deep_and_long_facts_are_damage(tmp_path):
    history = History(tmp_path / "h.sqlite")
    history.append(make_run("one"))
    for facts in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        with sqlite3.connect(history.path) as file:
            file.execute("UPDATE runs SET facts = ?", (facts,))
        with pytest.raises(InputError, match="history cannot be used: run 1"):
            history.runs()


@pytest.mark.parametrize(
    "spoil",
    ["UPDATE figures SET value = 'much'", "UPDATE runs SET facts = '{'", "UPDATE runs SET facts = '[]'"],
)
def test_damaged_content_is_bad_input(tmp_path, spoil):
    history = History(tmp_path / "h.sqlite")
    history.append(make_run("one"))
    history.check()
    with sqlite3.connect(history.path) as file:
        file.execute(spoil)
    with pytest.raises(InputError, match="history cannot be used"):
        history.check()
