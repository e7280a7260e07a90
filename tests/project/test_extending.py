"""docs/extending, followed: a chip is one row of a table; a budget's key a field and a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bluelm.errors import InputError
from eval.budget import limits
from eval.budget.budget import judge
from eval.budget.limits import Budget, Limit, MostBytes
from eval.files.memory import PeakMemory
from eval.speed.speed_model import find_soc
from pipeline.cli import main
from targets import socs
from targets.registry import find
from tests.support.checkpoints.shapes import tiny_checkpoint

ROW = (
    "  - {id: SM9999, name: Snapdragon 9, vendor: qualcomm, aliases: [snapdragon-9], qnn_soc_model: 99,"
    " hexagon_arch: 85, dram_gb_s: 90, context_binary_mib: 2048}\n"
)


@pytest.fixture
def one_more_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    table = tmp_path / "socs.yaml"
    table.write_text(socs.TABLE.read_text(encoding="utf-8") + ROW, encoding="utf-8")
    monkeypatch.setattr(socs, "TABLE", table)
    socs.table.cache_clear()
    yield
    socs.table.cache_clear()


def test_a_chip_is_one_row(one_more_chip: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find("snapdragon-9").soc.qnn_soc_model == 99
    model = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(SystemExit) as leaving:
        main(["plan", "--target", "snapdragon", "--soc", "sm9999", "--model", str(model), "--out", str(tmp_path)])
    assert leaving.value.code == 0
    told = capsys.readouterr().out
    assert "on Snapdragon 9" in told and "sm9999" in told and "compiled" in told
    assert {find_soc(name).bandwidth("npu") for name in ("SM9999", "Snapdragon 9")} == {90e9}


def test_without_its_row_the_chip_is_refused() -> None:
    with pytest.raises(InputError, match="unknown chip 'sm9999'"):
        find("snapdragon", "sm9999")
    with pytest.raises(InputError, match="no memory bandwidth is known for 'sm9999'"):
        find_soc("sm9999")


class Wider(Budget):
    """Step 2."""

    max_peak_memory_bytes: MostBytes | None = None


def test_a_budget_s_key_is_a_field_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Limit("peak_memory_bytes", "bytes", "run", drawn=False)
    monkeypatch.setitem(limits.LIMITS, "max_peak_memory_bytes", row)  # step 3
    with PeakMemory() as peak:
        figure = replace(peak.measurement(), value=5e8)  # a figure of its kind
    for asked, passed in (({"at_most": "1 TB", "accept": "measured"}, True), ("1 kB", False)):
        budget = Wider.model_validate({"max_peak_memory_bytes": asked, "structure": False, "two_sided": False})
        (check,) = judge(budget, [figure], ("cpu",)).checks
        assert (check.name, check.value, check.passed) == ("max_peak_memory_bytes", figure.value, passed)
