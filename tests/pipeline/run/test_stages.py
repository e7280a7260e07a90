"""Stages: done once for the same input, redone when input or files change; folders that errors leave behind."""

import os
import shutil
from pathlib import Path

import pytest

from bluelm.errors import InputError
from pipeline.run.stages import Stages, meaning, run_folder


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


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_touched_files_redo_it(tmp_path: Path, damage: str) -> None:
    calls: list[str] = []
    folder = Stages(tmp_path).run("quantized", {}, writer("a", calls))
    if damage == "change":
        (folder / "result.txt").write_text("b")
    else:
        (folder / "result.txt").unlink()
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
            Stages(tmp_path).run("quantized", {"bits": bits}, broken, shutil.rmtree)
        assert len(list((tmp_path / "quantized.partial").iterdir())) == expected


def test_ctrl_c_keeps_what_can_be_resumed(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        folder.with_name("quantized.partial").mkdir()
        (folder.with_name("quantized.partial") / "block-0").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run") as folder:
        Stages(folder).run("quantized", {}, broken)
    assert (tmp_path / "run" / "quantized.partial").is_dir()


@pytest.mark.parametrize("blocks", [0, 3])
def test_bad_input_costs_no_finished_block(tmp_path: Path, blocks: int) -> None:
    """And where none is finished, nothing is left."""

    def broken(folder: Path) -> None:
        partial = folder.with_name("quantized.partial")
        partial.mkdir()
        for block in range(blocks):
            (partial / f"block-{block}").write_text("")
        raise InputError(f"NaN in block {blocks}")

    with pytest.raises(InputError), run_folder(tmp_path / "run") as folder:
        Stages(folder).run("quantized", {}, broken)
    left = list((tmp_path / "run" / "quantized.partial").glob("*"))
    assert len(left) == blocks
    assert (tmp_path / "run").exists() == bool(blocks)


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


def test_a_changed_byte_under_the_old_time_is_found(tmp_path: Path) -> None:
    calls, told = list[str](), list[str]()
    path = Stages(tmp_path).run("quantized", {}, writer("a", calls)) / "result.txt"
    before = path.stat()
    path.write_text("b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    Stages(tmp_path, told.append).run("quantized", {}, writer("a", calls))
    assert calls == ["a", "a"]
    assert told == ["quantized: made again, result.txt is not as it was left"]


def test_a_copied_folder_is_reused(tmp_path: Path) -> None:
    calls: list[str] = []
    Stages(tmp_path / "run").run("quantized", {"bits": 4}, writer("a", calls))
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)  # new time stamps
    Stages(tmp_path / "copy").run("quantized", {"bits": 4}, writer("a", calls))
    assert calls == ["a"]


def test_why_a_stage_is_made_again_is_said(tmp_path: Path) -> None:
    told: list[str] = []
    Stages(tmp_path).run("quantized", {"bits": 4, "text": "x"}, writer("a", []))
    Stages(tmp_path, told.append).run("quantized", {"bits": 8, "text": "x", "more": 1}, writer("b", []))
    assert told == ["quantized: made again, other input: bits, more"]


def test_a_users_files_are_not_removed(tmp_path: Path) -> None:
    """Neither a folder of the stage's name, nor a file laid into a stage's folder."""
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        Stages(tmp_path).run("quantized", {}, writer("a", []))
    folder = Stages(tmp_path).run("lowered", {"bits": 4}, writer("a", []))
    (folder / "more.txt").write_text("mine")
    with pytest.raises(InputError, match=r"more\.txt"):
        Stages(tmp_path).run("lowered", {"bits": 8}, writer("b", []))
    assert sorted(p.name for p in folder.iterdir()) == ["more.txt", "result.txt"]


@pytest.mark.parametrize("mine", ["judged/notes.txt", "quantized.partial/block-0", "report.json", "log.txt"])
def test_a_users_files_are_told_of_before_any_work(tmp_path: Path, mine: str) -> None:
    """Also where only a later stage, or the report, would have to take their place."""
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("mine")
    with pytest.raises(InputError, match=Path(mine).parts[0]):
        Stages(tmp_path).check(["quantized", "judged"])
    (tmp_path / mine).unlink()
    Stages(tmp_path).run("lowered", {}, writer("a", []))
    Stages(tmp_path).check(["lowered", "onnx-cpu"])


def test_a_link_in_a_stages_folder_is_a_users_file(tmp_path: Path) -> None:
    folder = Stages(tmp_path).run("lowered", {"bits": 4}, writer("a", []))
    (folder / "more").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="more"):
        Stages(tmp_path).run("lowered", {"bits": 8}, writer("b", []))
    assert (folder / "more").is_symlink()


def test_a_run_folder_that_is_removed_meanwhile_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="removed while"), run_folder(tmp_path / "dist" / "run") as folder:
        shutil.rmtree(folder)
        (folder / "result.txt").write_text("a")


DAMAGED = [
    "", "{", "[]", '{"files": 3}', '{"files": {"result.txt": [1]}}', "[" * 100_000,
    '{"files": {"result.txt": [[1], "x"]}}', '{"files": {"result.txt": [1, {}]}}',
    '{"files": {"result.txt": [true, ""]}}',
    f'{{"files": {{"result.txt": [{"9" * 5000}, "x"]}}}}', '{"files": {"result.txt": [1, "x"]}, "fingerprint": [1]}',
    '{"files": {"result.txt": [1, "x"]}, "inputs": {"a": ' + "[" * 900 + "]" * 900 + "}}",
]  # fmt: skip


@pytest.mark.parametrize("record", DAMAGED)
def test_a_damaged_record_is_no_record(tmp_path: Path, record: str) -> None:
    calls: list[str] = []
    Stages(tmp_path).run("quantized", {}, writer("a", calls))
    (tmp_path / ".stages" / "quantized.json").write_text(record)
    Stages(tmp_path).run("quantized", {}, writer("a", calls))
    assert calls == ["a", "a"]


@pytest.mark.parametrize("note", ["", "x", None])
def test_a_damaged_note_of_what_was_begun_is_mended(tmp_path: Path, note: str | None) -> None:
    calls: list[str] = []
    Stages(tmp_path).run("quantized", {}, writer("a", calls))
    begun = tmp_path / ".stages" / "quantized.begun"
    before = begun.read_text()
    begun.unlink() if note is None else begun.write_text(note)
    Stages(tmp_path).run("quantized", {}, writer("a", calls))
    assert calls == ["a"] and begun.read_text() == before


def test_a_report_is_moved_away_when_a_stage_is_made_again(tmp_path: Path) -> None:
    Stages(tmp_path).run("judged", {"text": 1}, writer("a", []))
    (tmp_path / "report.json").write_text("passed")
    Stages(tmp_path).run("judged", {"text": 1}, writer("a", []))
    assert (tmp_path / "report.json").exists()
    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("judged", {"text": 2}, interrupted)
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "previous" / "report.json").read_text() == "passed"


def interrupted(folder: Path) -> None:
    raise KeyboardInterrupt


def test_comments_change_no_key() -> None:
    plain = "def f(x: int) -> int:\n    return x + 1\n"
    told = '"""What it is."""\n\n# why\ndef f(x: int) -> int:\n    """More."""\n    return (x + 1)  # one more\n'
    assert meaning(plain) == meaning(told)
    assert meaning(plain) != meaning(plain.replace("+ 1", "+ 2"))


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    """Whatever process had its number; a user's file of a like name stays."""
    Stages(tmp_path).run("quantized", {}, writer("a", []))
    left = [tmp_path / ".quantized.7.tmp", tmp_path / ".junit.xml.70.tmp", tmp_path / ".stages" / ".x.begun.9.tmp"]
    left[0].mkdir()
    (left[0] / "weights.bin").write_text("half")
    own = [tmp_path / ".notes.7.tmp", tmp_path / ".quantized.x.tmp", tmp_path / "quantized.7.tmp"]
    for path in [*left[1:], *own]:
        path.write_text("half")
    with run_folder(tmp_path):
        assert not [path for path in left if path.exists()]
        assert all(path.exists() for path in own)


def test_a_byte_of_a_record_that_decides_nothing_is_mended(tmp_path: Path) -> None:
    calls: list[str] = []
    Stages(tmp_path).run("quantized", {"bits": 4, "seed": 7}, writer("a", calls))
    record = tmp_path / ".stages" / "quantized.json"
    sound = record.read_bytes()
    for damaged in (sound.replace(b'"seed": 7', b'"seed": 5'), sound.replace(b"\n", b"\r", 1), sound + b" "):
        record.write_bytes(damaged)
        Stages(tmp_path).run("quantized", {"bits": 4, "seed": 7}, writer("a", calls))
        assert record.read_bytes() == sound and calls == ["a"]
