"""Several processes: the same bytes as one, and a lost one ends the run so that it can be taken up again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bluelm.errors import InputError
from calibration.ranks import Ranks
from calibration.walk import Split
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.limits import HANG_S

SMALL = ("--method", "awq+gptq", "--samples", "16", "--length", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ranks") / "model", layers=3)


@pytest.fixture(scope="module")
def alone(model: Path) -> Path:
    """What one process makes."""
    out = model.parent / "alone"
    subprocess.run([sys.executable, "-m", "pipeline", "quantize", str(model), str(out), *SMALL], check=True)
    return out


def torchrun(model: Path, out: Path, ranks: int, module: str = "pipeline") -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", module, "quantize", str(model), str(out), *SMALL]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_ranks_make_the_same_bytes(model: Path, alone: Path, tmp_path: Path) -> None:
    subprocess.run(torchrun(model, tmp_path / "out", 2), check=True)
    assert content(tmp_path / "out") == content(alone)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_ranks_learn_the_same_rounding(model: Path, tmp_path: Path) -> None:
    learning = ("--refine", "2")
    subprocess.run([*torchrun(model, tmp_path / "two", 2), *learning], check=True)
    one = [sys.executable, "-m", "pipeline", "quantize", str(model), str(tmp_path / "one"), *SMALL, *learning]
    said = subprocess.run(one, check=True, capture_output=True, text=True)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert "Planned" in said.stderr  # and how far off that was


def test_a_killed_rank_ends_the_run_which_one_process_completes(model: Path, alone: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    run = subprocess.run(
        torchrun(model, out, 2, "tests.support.faults.lost_rank"), capture_output=True, text=True, timeout=HANG_S
    )
    assert run.returncode != 0
    assert "another rank of the run was lost" in run.stderr or "interrupted" in run.stderr, run.stderr
    assert (partial / "block-00000.safetensors").exists()
    assert not out.exists()
    done = [sys.executable, "-m", "pipeline", "quantize", str(model), str(out), *SMALL]
    subprocess.run(done, check=True)
    assert content(out) == content(alone)


@pytest.mark.parametrize("samples", [1, 5, 8, 16, 37, 128])
@pytest.mark.parametrize("length", [16, 512, 5000])
def test_every_sample_is_in_one_batch_of_one_rank(samples: int, length: int) -> None:
    parts = Split(samples, length).parts()
    batches = [batch for part in parts for batch in part]
    assert [batch.start for batch in batches] == [0, *[batch.stop for batch in batches[:-1]]]
    assert batches[-1].stop == samples
    for size in range(1, len(parts) + 1):
        mine = [Split(samples, length, Ranks(rank, size)).mine for rank in range(size)]
        assert [own.start for own in mine] == [0, *[own.stop for own in mine[:-1]]]
        assert mine[-1].stop == samples
    with pytest.raises(InputError, match=f"shared by {len(parts)} ranks, not by {len(parts) + 1}"):
        _ = Split(samples, length, Ranks(0, len(parts) + 1)).mine


def test_alone_a_sum_is_that_of_its_addends_in_order() -> None:
    addends = [[torch.rand(3, generator=torch.Generator().manual_seed(seed))] for seed in range(4)]
    expected = ((addends[0][0] + addends[1][0]) + addends[2][0]) + addends[3][0]
    assert torch.equal(Ranks().total(addends)[0], expected)
