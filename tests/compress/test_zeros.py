"""Groups, rows and channels of zeros: every scale is above zero, whatever makes or writes it, and phones load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from calibration.samples import load_samples
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.formats.adopt import adopt, given_recipe
from compress.formats.packed import PackedCheckpoint
from compress.formats.write import Kind, check_recipe, write
from compress.methods.grid import SMALLEST_SCALE, choose_grid, representable
from compress.recipe import Recipe
from export.executorch import xnnpack as executorch
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from tests.support.checkpoints.lowered import mean_kl
from tests.support.checkpoints.shapes import write_checkpoint

METHODS = ("rtn", "gptq", "awq", "awq+gptq")
WIDTHS = ((4, 32), (4, -1), (8, 32), (8, -1))


def holed(folder: Path, **shape: Any) -> Checkpoint:
    """A random checkpoint with rows, groups and input channels of zeros, of both signs, in every matrix."""
    write_checkpoint(folder, inner=128, vocab=384, **shape)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "embed" not in name:
            tensor[:32] = 0.0  # more than a vector register holds: its lanes and the rest round alike
            tensor[:8] *= -1
            tensor[:, 32:64] = 0.0
            tensor[33:40, 32:64] *= -1
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def assert_positive(quantized: QuantizedCheckpoint) -> None:
    weights = {name: quantized.linear(name) for name in quantized.linears} | {"embedding": quantized.embed()}
    for name, weight in weights.items():
        assert (weight.scales > 0).all(), name
        assert weight.scales.isfinite().all(), name


@settings(max_examples=60)
@given(
    signs=st.lists(st.sampled_from((0.0, -0.0)), min_size=1, max_size=70),
    bits=st.sampled_from((4, 8)),
    group_size=st.sampled_from((32, 64, -1)),
    symmetric=st.booleans(),
    search=st.booleans(),
)
def test_scales_of_nothing_are_above_zero(
    signs: list[float], bits: int, group_size: int, symmetric: bool, search: bool
) -> None:
    weight = torch.tensor(signs).unsqueeze(1).repeat(1, 64)
    grid = choose_grid(weight, bits, group_size, symmetric, search=search, hessian=torch.eye(64))
    assert (grid.scales >= SMALLEST_SCALE).all()
    assert not grid.nearest(weight).dequantize().any()
    assert (representable(torch.tensor(signs)) == SMALLEST_SCALE).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_width_and_format(method: str, symmetric: bool, tmp_path: Path) -> None:
    checkpoint = holed(tmp_path / "float")
    samples = load_samples(None, checkpoint.tokenizer(), 2, 16, 0)
    for bits, group in WIDTHS:
        made = Recipe.make({"method": method, "bits": bits, "group_size": group, "symmetric": symmetric,
                            "head_bits": bits, "samples": 2, "length": 16})  # fmt: skip
        ours = quantize(checkpoint, samples, made, tmp_path / f"{bits}-{group}")
        assert_positive(ours)
        for kind in get_args(Kind):
            try:
                check_recipe(checkpoint.config, made, kind)
            except InputError:
                continue
            out = tmp_path / f"{bits}-{group}-{kind}"
            write(ours, checkpoint, out, kind)
            stored = load_file(out / "model.safetensors")
            scales = {name: tensor for name, tensor in stored.items() if name.endswith(("scales", "weight_scale"))}
            assert len(scales) == 14 and all((tensor > 0).all() for tensor in scales.values())
            back = PackedCheckpoint.open(out)
            assert_positive(adopt(back, given_recipe(back, Recipe()), tmp_path / f"{out.name}-again"))


@pytest.mark.parametrize(("refine", "rotate"), [(20, False), (0, True), (20, True)])
def test_refined_and_rotated(refine: int, rotate: bool, tmp_path: Path) -> None:
    checkpoint = holed(tmp_path / "float")
    made = Recipe.make({"refine": refine, "rotate": rotate, "samples": 2, "length": 16})
    assert_positive(quantize(checkpoint, load_samples(None, checkpoint.tokenizer(), 2, 16, 0), made, tmp_path / "q"))


@pytest.mark.parametrize("bad", [-(2.0**-24), 0.0, -0.0, float("nan")])
def test_no_weight_has_another_scale(bad: float) -> None:
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    zeros, scales = torch.full((2, 1), 8, dtype=torch.uint8), torch.full((2, 1), 0.5, dtype=torch.float16)
    assert QuantizedTensor(codes, scales, zeros, 4, -1).symmetric
    scales[1] = bad
    with pytest.raises(InputError, match="a scale is not above zero"):
        QuantizedTensor(codes, scales, zeros, 4, -1)


def test_xnnpack_loads_and_runs_a_model_with_holes(tmp_path: Path) -> None:
    """Of scales -2**-24, as `torch.maximum(0., -0.)` once gave them, XNNPACK makes no weight."""
    checkpoint = holed(tmp_path / "float", layer_norm=False, layers=1)
    made = Recipe.make({"method": "rtn", "symmetric": True, "samples": 1, "length": 8})
    ours = quantize(checkpoint, None, made, tmp_path / "q")
    tokens = torch.randint(384, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    wanted = TorchRuntime(ours, 32).logits(tokens)
    artifact = executorch.export(ours, tmp_path / "a", context=32, chunk=8)
    with open_runtime(artifact.folder) as runtime:
        found = runtime.logits(tokens)
        stepped = np.stack([runtime.decode(token) for token in tokens[:1]])
    assert np.isfinite(found).all() and np.isfinite(stepped).all()
    assert np.abs(wanted[:, :32]).max() == 0 and np.abs(found[:, :32]).max() < 1e-6  # the head's rows of zeros
    assert mean_kl(wanted, found) < 5e-3
