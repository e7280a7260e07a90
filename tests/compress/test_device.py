"""Quantizing on a second device: the codes are the CPU's, and no operator mixes devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from calibration.samples import CalibrationReport, Samples
from compress.engine import quantize
from compress.recipe import Recipe
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.emulated_gpu import DEVICE, emulated

RECIPES = {
    "gptq": {"sweeps": 1},
    "gptq, plain": {"act_order": False, "sweeps": 0, "correction": 0.0},
    "gptq, refined": {"refine": 3, "symmetric": False, "sweeps": 0},
    "gptq, rotated, bfloat16": {"rotate": True, "activations": "bfloat16", "sweeps": 0},
    "awq": {"method": "awq", "symmetric": False},
    "awq+gptq": {"method": "awq+gptq", "sweeps": 0},
    "rtn": {"method": "rtn"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("device") / "model", layers=1))


@pytest.fixture(scope="module")
def samples(checkpoint: Checkpoint) -> Samples:
    tokens = torch.randint(checkpoint.config.vocab_size, (6, 24), generator=torch.Generator().manual_seed(0))
    return Samples(tokens, CalibrationReport("random", "", 6, 0, 6, 24, 6 * 24, 0, 0.0, 0.0, 0.0, 0.0, ()))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize("name", RECIPES)
def test_another_device_gives_the_same_codes(
    checkpoint: Checkpoint, samples: Samples, tmp_path: Path, name: str
) -> None:
    recipe = Recipe.make({"samples": 6, "length": 24, **RECIPES[name]})
    quantize(checkpoint, samples, recipe, tmp_path / "cpu")
    with emulated() as emulation:
        quantize(checkpoint, samples, recipe, tmp_path / "device", device=DEVICE)
    assert emulation.computed > (100 if recipe.reads_text else 0)
    expected, found = tensors(tmp_path / "cpu"), tensors(tmp_path / "device")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_the_emulation_refuses_what_a_gpu_refuses() -> None:
    with emulated():
        there, here = torch.ones(3, 4, device=DEVICE), torch.ones(3, 4)
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here[torch.tensor([0], device=DEVICE)],
            lambda: here.index_add_(0, torch.tensor([0], device=DEVICE), there[:1]),
            lambda: torch.randperm(4, generator=torch.Generator(), device=DEVICE),
            lambda: there.numpy(),
        ):
            with pytest.raises(RuntimeError):
                mixed()
        assert (there * torch.tensor(2.0))[torch.tensor([0, 2])].cpu().tolist() == [[2.0] * 4] * 2
