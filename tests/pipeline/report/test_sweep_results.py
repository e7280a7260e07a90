"""What a sweep makes of its variants: combinations, sharing, the ones that no other beats."""

from __future__ import annotations

import csv
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bluelm.errors import InputError
from pipeline.commands.sweep import Variant, expand, grouped, run_sweep, share
from pipeline.report.sweep_results import VariantRow, lines, mark_pareto, write_results
from pipeline.run.stages import Stages


def row(name: str, size: float | None, speed: float, kl: float | None, target: str = "t", how: str = "e") -> VariantRow:
    return VariantRow(name, "gptq", "4", "32", target, 0, size, speed, how, kl, 1.0)


def test_every_combination_once_and_one_recipe_together():
    variants = expand("gptq, awq", "4,8,4", "32", "snapdragon,apple")
    assert len(variants) == 8
    assert variants[0] == Variant("gptq", "4", "32", "snapdragon")
    assert variants[0].name == "gptq-w4-g32-snapdragon"
    assert Variant("rtn", "8", "-1", "apple").name == "rtn-w8-row-apple"
    groups = grouped(variants)
    assert [len(group) for group in groups] == [2, 2, 2, 2]
    assert all(len({v.recipe for v in group}) == 1 for group in groups)


@pytest.mark.parametrize("empty", ["", " , "])
def test_an_empty_list_is_refused(empty):
    with pytest.raises(InputError, match="--bits"):
        expand("gptq", empty, "32", "snapdragon")


@pytest.mark.parametrize("rest", [["--target", "x"], ["--name=y"], ["--dry-run"]])
def test_options_that_the_sweep_sets_are_refused(rest, tmp_path):
    with pytest.raises(InputError, match="sets --"):
        run_sweep("snapdragon", "gptq", "4", "32", tmp_path, 1, None, rest)


def test_known_pareto_front():
    rows = [
        row("small", 1, 10, 0.9),
        row("good", 2, 9, 0.1),
        row("beaten", 2, 9, 0.2),
        row("fast", 3, 20, 0.3),
        row("twin", 2, 9, 0.1),
        row("no figures", None, 0, None),
        row("no number", 1, 30, math.nan),
        row("other target", 9, 1, 9, target="u"),
        row("other way of measuring", 9, 1, 9, how="m"),
    ]
    marked = {r.name for r in mark_pareto(rows) if r.pareto}
    assert marked == {"small", "good", "fast", "twin", "other target", "other way of measuring"}


points = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@given(st.lists(points, min_size=1, max_size=12))
def test_the_front_is_what_the_definition_says(values):
    marked = mark_pareto([row(str(i), *v) for i, v in enumerate(values)])
    for (size, speed, kl), found in zip(values, marked, strict=True):
        beaten = any(s <= size and v >= speed and k <= kl and (s, v, k) != (size, speed, kl) for s, v, k in values)
        assert found.pareto is not beaten
    assert any(r.pareto for r in marked)


def test_table_file_and_drawing(tmp_path):
    rows = mark_pareto([row("a", 2e6, 10, 0.1), row("b", 3e6, 9, 0.2)])
    rows.append(VariantRow("c", "awq", "4", "7", "t", 4, problem="groups of 7 do not fit"))
    text = "\n".join(lines(rows))
    assert "*  a" in text and "*  b" not in text and "exit 4: groups of 7" in text
    written = write_results(rows, tmp_path)
    assert [p.name for p in written] == ["sweep.csv", "sweep.svg"]
    with written[0].open() as file:
        found = list(csv.DictReader(file))
    assert [r["name"] for r in found] == ["a", "b", "c"] and found[0]["pareto"] == "True"
    first = written[1].read_bytes()
    assert write_results(rows, tmp_path) and written[1].read_bytes() == first


def test_sharing_links_what_is_finished_and_nothing_else(tmp_path):
    before, behind = tmp_path / "before", tmp_path / "behind"
    for name in ("quantized", "onnx-cpu", "compiled"):
        (before / name).mkdir(parents=True)
        (before / name / "weights").write_bytes(b"w" * 100)
    (before / ".stages").mkdir()
    for name in ("quantized", "compiled"):
        (before / ".stages" / f"{name}.json").write_text("{}")
    share(before, behind)
    assert sorted(p.name for p in behind.iterdir()) == [".stages", "quantized"]  # onnx-cpu was not finished
    linked = behind / "quantized" / "weights"
    assert linked.samefile(before / "quantized" / "weights")
    linked.unlink()
    share(before, behind)  # what is there is left alone
    assert not linked.exists() and (before / "quantized" / "weights").exists()


def test_sharing_that_was_killed_is_no_users_file(tmp_path, monkeypatch):
    """What it left half-way is made again by the run that it is for."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name in "ab":
            (folder / name).write_text(name)

    def die(source: str, target: str) -> None:
        if Path(source).name == "b":
            raise KeyboardInterrupt
        shutil.copyfile(source, target)

    Stages(tmp_path / "before").run("quantized", {}, make)
    monkeypatch.setattr(os, "link", die)
    with pytest.raises(KeyboardInterrupt):
        share(tmp_path / "before", tmp_path / "behind")
    stages = Stages(tmp_path / "behind")
    stages.check(["quantized"])
    assert sorted(path.name for path in stages.run("quantized", {}, make).iterdir()) == ["a", "b"]


def test_a_link_that_cannot_be_made_becomes_a_copy(tmp_path, monkeypatch):
    before = tmp_path / "before"
    (before / "quantized").mkdir(parents=True)
    (before / "quantized" / "weights").write_bytes(b"w")
    (before / ".stages").mkdir()
    (before / ".stages" / "quantized.json").write_text("{}")

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    share(before, tmp_path / "behind")
    copy = Path(tmp_path / "behind" / "quantized" / "weights")
    source = before / "quantized" / "weights"
    assert copy.read_bytes() == b"w" and copy.stat().st_mtime_ns == source.stat().st_mtime_ns


def test_emulated_errors_are_marked_and_their_stand_in_is_named():
    rows = [row("a", 2e6, 10, 0.1), replace(row("b", 3e6, 9, 0.2), emulated_by="a simulator 1.0")]
    text = list(lines(rows))
    assert text[-1] == "† emulated: a simulator 1.0"
    assert ["†" in line for line in text[2:4]] == [False, True]
