"""Stages: done once for the same input, redone when input or files change; folders that errors leave behind."""

import os
from pathlib import Path

import pytest

from bluelm.errors import InputError
from pipeline.stages import Stages, run_folder


def writer(text: str, calls: list[str]):
    def work(folder: Path) -> None:
        calls.append(text)
        folder.mkdir()
        (folder / "result.txt").write_text(text)

    return work


def test_a_finished_stage_is_reused(tmp_path: Path) -> None:
    calls: list[str] = []
    Stages(tmp_path).run("quantized", {"bits": 4}, writer("a", calls))
    stages = Stages(tmp_path)
    folder = stages.run("quantized", {"bits": 4}, writer("a", calls))
    assert (folder / "result.txt").read_text() == "a"
    assert calls == ["a"]
    assert [s.reused for s in stages.done] == [True]


def test_other_input_redoes_it(tmp_path: Path) -> None:
    calls: list[str] = []
    Stages(tmp_path).run("quantized", {"bits": 4}, writer("a", calls))
    Stages(tmp_path).run("quantized", {"bits": 8}, writer("b", calls))
    assert calls == ["a", "b"]
    assert (tmp_path / "quantized" / "result.txt").read_text() == "b"


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_touched_files_redo_it(tmp_path: Path, damage: str) -> None:
    calls: list[str] = []
    folder = Stages(tmp_path).run("quantized", {}, writer("a", calls))
    if damage == "change":
        (folder / "result.txt").write_text("b")
    elif damage == "remove":
        (folder / "result.txt").unlink()
    else:
        (folder / "more.txt").write_text("c")
    Stages(tmp_path).run("quantized", {}, writer("a", calls))
    assert calls == ["a", "a"]
    assert sorted(p.name for p in folder.iterdir()) == ["result.txt"]


def test_a_stage_that_broke_off_is_not_taken_for_done(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        folder.mkdir()
        (folder / "half.txt").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("quantized", {}, broken)
    assert not Stages(tmp_path).is_done("quantized", {})
    calls: list[str] = []
    folder = Stages(tmp_path).run("quantized", {}, writer("a", calls))
    assert sorted(p.name for p in folder.iterdir()) == ["result.txt"]


def test_an_error_before_any_result_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "dist" / "run"
    with pytest.raises(InputError), run_folder(folder):
        (folder / "log.txt").write_text("began")
        raise InputError("bad tensor")
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_what_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "dist" / "run"
    with pytest.raises(InputError), run_folder(folder):
        Stages(folder).run("quantized", {}, writer("a", []))
        raise InputError("bad text")
    assert Stages(folder).is_done("quantized", {})


def test_an_error_does_not_remove_a_folder_that_was_there(tmp_path: Path) -> None:
    with pytest.raises(InputError), run_folder(tmp_path):
        raise InputError("bad text")
    assert tmp_path.is_dir()


def test_what_an_interrupted_stage_left_is_kept_for_the_same_input_only(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        partial = folder.with_name("quantized.partial")
        partial.mkdir(exist_ok=True)
        (partial / f"block-{len(list(partial.iterdir()))}").write_text("")
        raise KeyboardInterrupt

    for bits, expected in ((4, 1), (4, 2), (8, 1)):
        with pytest.raises(KeyboardInterrupt):
            Stages(tmp_path).run("quantized", {"bits": bits}, broken)
        assert len(list((tmp_path / "quantized.partial").iterdir())) == expected


def test_ctrl_c_keeps_what_can_be_resumed(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        folder.with_name("quantized.partial").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run") as folder:
        Stages(folder).run("quantized", {}, broken)
    assert (tmp_path / "run" / "quantized.partial").is_dir()


def test_bad_input_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        folder.with_name("quantized.partial").mkdir()
        raise InputError("NaN in block 3")

    with pytest.raises(InputError), run_folder(tmp_path / "run") as folder:
        Stages(folder).run("quantized", {}, broken)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        run_folder(tmp_path / "run"),
        pytest.raises(InputError, match="another run is writing"),
        run_folder(tmp_path / "run"),
    ):
        pass
    with run_folder(tmp_path / "run"):
        pass


def test_a_run_folder_that_is_a_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="is a file"), run_folder(tmp_path / "run"):
        pass


def test_times_in_whole_seconds_are_a_caches(tmp_path: Path) -> None:
    """Some CI caches cut times off; a file changed within the same second is found out nevertheless."""
    calls: list[str] = []
    path = Stages(tmp_path).run("quantized", {}, writer("a", calls)) / "result.txt"
    second = path.stat().st_mtime_ns // 10**9 * 10**9
    os.utime(path, ns=(second, second))
    Stages(tmp_path).run("quantized", {}, writer("a", calls))
    assert calls == ["a"]
    os.utime(path, ns=(second, second + 5))
    Stages(tmp_path).run("quantized", {}, writer("a", calls))
    assert calls == ["a", "a"]
