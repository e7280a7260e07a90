"""`--bits auto` from the command line: a table, a recipe that is fed back, what a chip cannot hold left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bluelm.checkpoint import Checkpoint
from compress.checkpoint.store import QuantizedCheckpoint
from compress.formats.packed import PackedCheckpoint
from compress.recipe import Recipe
from pipeline.cli import main
from pipeline.run.widths import held_by
from targets.registry import find
from tests.support.checkpoints.shapes import tiny_checkpoint

SHORT = ["--samples", "8", "--length", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def call(arguments: list[str]) -> int:
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)


def test_a_recipe_comes_out_and_goes_in_again(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert call(["quantize", str(model), str(first), "--bits", "auto", "--size", "0.9MB", *SHORT]) == 0
    assert "MB of weights" in capfd.readouterr().err
    table = json.loads((first / "widths.json").read_text())
    assert table["bytes"] <= 900_000
    assert {"name", "bits", "group_size", "bytes", "kl", "measured", "kl_measured"} == set(table["linears"][0])
    quantized = QuantizedCheckpoint.open(first)
    for row in table["linears"]:
        info = quantized.linears[row["name"]]
        assert (info.bits, info.group_size) == (row["bits"], row["group_size"])
    assert len({(row["bits"], row["group_size"]) for row in table["linears"]}) > 1
    assert call(["quantize", str(model), str(again), "--recipe", str(first / "recipe.yaml")]) == 0
    for name in quantized.info["files"]:
        assert (again / name).read_bytes() == (first / name).read_bytes()


def test_chosen_widths_go_into_another_tools_folder(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gptq"
    arguments = ["quantize", str(model), str(out), "--bits", "auto", "--method", "rtn", "--format", "gptq", *SHORT]
    assert call(arguments) == 0
    said = capfd.readouterr().err
    table = json.loads((out / "widths.json").read_text())["linears"]
    widths = {row["name"]: (row["bits"], row["group_size"]) for row in table if row["name"] != "lm_head"}
    assert len(set(widths.values())) > 1 and "Note: widths differ" in said
    found = PackedCheckpoint.open(out)
    for name, width in widths.items():
        ordered = found.linear(name)
        assert ordered is not None and ordered.weight.bits == width[0]
        assert width[1] in (ordered.weight.columns_per_group, -1)
    assert (out / "recipe.yaml").exists() and [path.name for path in tmp_path.iterdir()] == ["gptq"]


def test_a_whole_run_tells_the_table(model: Path, tmp_path: Path) -> None:
    arguments = ["--target", "generic-arm64", "--model", str(model), "--out", str(tmp_path), "--name", "run"]
    arguments += ["--method", "rtn", "--bits", "auto", "--context", "64", "--eval-tokens", "256", "--no-bundle", *SHORT]
    assert call(arguments) in (0, 3)  # a budget is for trained models
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    linears = report["details"]["widths"]["linears"]
    assert len(linears) == 2 * 7 + 1
    assert report["details"]["widths"]["bytes"] > sum(row["bytes"] for row in linears)
    resolved = Recipe.load(tmp_path / "run" / "widths" / "recipe.yaml")
    assert report["configuration"]["recipe"] == resolved.model_dump(mode="json")


def test_widths_that_a_chip_cannot_hold_are_no_choice(model: Path) -> None:
    config = Checkpoint.open(model).config
    allowed = held_by(find("dimensity"), config, Recipe.load("auto"), context=64, chunk=32)
    assert {(width.bits, width.group_size) for width in allowed.blocks} >= {(4, 32), (8, -1)}
    assert not any(width.bits == 8 and width.group_size != -1 for width in (*allowed.blocks, *allowed.head))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--bits", "auto", "--size", "a lot"], "a size is a number"),
        (["--bits", "auto", "--size", "1KB"], "give --size"),
        (["--bits", "auto", "--max-kl", "1e-15"], "give --max-kl"),
        (["--bits", "auto", "--max-kl", "0.1", "--size", "1GB"], "not both"),
        (["--size", "1GB"], "bits: auto"),
    ],
)
def test_limits_that_cannot_be(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert call(["quantize", str(model), str(tmp_path / "q"), *options, *SHORT]) == 2
    message = capfd.readouterr().err
    assert told in message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []
