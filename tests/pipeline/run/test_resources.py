"""The estimate of a run, and what is held against it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError, UnavailableError
from bluelm.system.files import demo_checkpoint
from compress.cost import cost, finished_size
from compress.engine import quantize
from compress.recipe import Recipe
from export.onnx import genai
from pipeline.run import resources
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


@pytest.mark.parametrize(
    "values",
    [{}, {"bits": 8, "group_size": -1}, {"symmetric": False}, {"layers": {"lm_head": {"bits": 4, "group_size": 32}}}],
)
def test_the_size_is_that_of_the_finished_tensors(tmp_path: Path, values: dict[str, object]) -> None:
    small = Checkpoint.open(write_checkpoint(tmp_path / "model", hidden=128, inner=192))
    recipe = Recipe.make({"method": "rtn", **values})
    found = quantize(small, None, recipe, tmp_path / "out")
    vectors = small.config.hidden_size * 4 * (2 * small.config.num_layers + 1)
    files = list((tmp_path / "out").glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert sum(path.stat().st_size for path in files) == finished_size(small.config, recipe) + vectors + headers
    assert found.recipe == recipe


def test_activations_move_to_disk_where_ram_is_too_small_and_no_further(checkpoint: Checkpoint) -> None:
    recipe = Recipe.make({"samples": 2048})
    in_ram, on_disk = (cost(checkpoint, recipe, on_disk=place, rate=1e11) for place in (False, True))
    assert on_disk.memory < in_ram.memory
    assert on_disk.disk > in_ram.disk
    between = f"{(in_ram.memory + on_disk.memory) / 2e9}GB"
    assert not resources.plan_quantizing(checkpoint, recipe, "64GB").quantizing.on_disk
    assert resources.plan_quantizing(checkpoint, recipe, between).quantizing.on_disk
    with pytest.raises(InputError, match=r"more than --max-memory 0\.30 GB\n  fix:   give --max-memory 0\.[0-9]GB"):
        resources.plan_quantizing(checkpoint, recipe, "0.3GB")


def test_blocks_add_time_and_disk_but_no_memory(tmp_path: Path) -> None:
    few, many = (
        cost(
            Checkpoint.open(write_checkpoint(tmp_path / str(n), layers=n, tokenizer=False)),
            Recipe(),
            on_disk=False,
            rate=1e9,
        )
        for n in (2, 6)
    )
    assert few.memory == many.memory
    assert many.seconds > 2 * few.seconds
    assert many.size > few.size


def wide(checkpoint: Checkpoint) -> Checkpoint:
    """A block as wide as BlueLM-7B's; nobody reads it."""
    shape = {"vocab_size": 100096, "hidden_size": 4096, "intermediate_size": 11008, "num_heads": 32, "num_kv_heads": 32}
    return replace(checkpoint, config=replace(checkpoint.config, num_layers=2, head_dim=128, **shape))


def test_the_memory_is_that_measured_at_full_width(checkpoint: Checkpoint) -> None:
    recipe = Recipe.make({"group_size": 128, "sweeps": 1, "samples": 8, "length": 512})
    planned = cost(wide(checkpoint), recipe, on_disk=False, rate=1e11).memory
    assert planned / 1e9 == pytest.approx(4.16, rel=0.1)  # benchmarks/speed/full_width.md


def test_sweeps_take_memory_for_the_systems_of_many_groups(checkpoint: Checkpoint) -> None:
    without, few, many = (
        cost(wide(checkpoint), Recipe.make({"samples": 8, **values}), on_disk=False, rate=1e11).memory
        for values in ({"sweeps": 0}, {"group_size": 128}, {"group_size": 32})
    )
    assert without <= few < many


def test_time_and_memory_of_the_demo_run_are_those_measured(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "matmul_rate", lambda: 1.2e11)  # as on the machine where it took 223 s
    monkeypatch.setattr("compress.cost.matmul_rate", lambda: 1.2e11)
    sizes = {"context": 512, "chunk": 128, "watched_tokens": 32 * 512, "cpu_tokens": 16384}
    npu = resources.plan_run(checkpoint, Recipe(), None, runtime="qnn-context", npu_tokens=4096, **sizes)
    assert 0.8 * 223 < npu.seconds < 1.25 * 223
    executorch = resources.plan_run(checkpoint, Recipe(), None, runtime="executorch-qnn", npu_tokens=4096, **sizes)
    assert npu.memory == pytest.approx(1.18e9, rel=0.1) and executorch.memory == pytest.approx(1.90e9, rel=0.1)
    cpu = resources.plan_run(checkpoint, Recipe(), None, runtime="onnx-cpu", npu_tokens=0, **sizes)
    assert cpu.seconds < npu.seconds / 2


def test_a_table_that_is_also_the_head_ships_twice(tmp_path: Path) -> None:
    shape = {"architecture": "LlamaForCausalLM", "vocab": 32768, "layer_norm": False, "tied": True}
    model = write_checkpoint(tmp_path / "model", tokenizer=False, **shape)
    sizes = {"context": 32, "chunk": 8, "watched_tokens": 0, "cpu_tokens": 64, "npu_tokens": 0}
    recipe = Recipe.make({"method": "rtn"})
    planned = resources.plan_run(Checkpoint.open(model), recipe, None, runtime="onnx-genai", **sizes).artifact
    made = genai.export(rounded(tmp_path / "q", source=model), tmp_path / "a", context=32, chunk=8)
    assert planned == pytest.approx(made.bytes, rel=0.15)


def test_qualcomms_compiler_decides_the_memory_of_wide_models(checkpoint: Checkpoint) -> None:
    sizes = {"context": 512, "chunk": 128, "watched_tokens": 1024, "cpu_tokens": 1024, "npu_tokens": 1024}
    model, recipe = wide(checkpoint), Recipe.make({"samples": 1, "length": 8})
    model = replace(model, config=replace(model.config, num_layers=4))
    planned, twice = (
        resources.plan_run(model, recipe, limit, runtime=runtime, **sizes)
        for runtime, limit in (("qnn-context", "12GB"), ("executorch-qnn", "8GB"))
    )
    with pytest.raises(InputError, match=r"compiling for qnn-context take about 11\.94 GB: more than --max-memory 8"):
        resources.plan_run(model, recipe, "8GB", runtime="qnn-context", **sizes)
    assert planned.artifact is not None and twice.artifact is not None
    for found, measured in ((planned, 11.26e9), (twice, 6.37e9)):  # in the compiler (benchmarks/speed/runtimes.md)
        assert measured < found.memory < measured + 1.2e9
    assert 1.9 < twice.artifact / planned.artifact <= 2


@pytest.mark.parametrize("text", ["nix", "-1GB", "0", "8 parsecs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        resources.bytes_of(text)


def test_a_disk_without_room_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = resources.plan_quantizing(checkpoint, Recipe(), None)
    resources.check_disk(planned, tmp_path / "deep" / "out")
    monkeypatch.setattr(resources.psutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"of disk, 0\.0 MB are free"):
        resources.check_disk(planned, tmp_path / "deep" / "out")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", "cuda:-1"])
def test_a_device_by_another_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="there is no device"):
        resources.compute_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_cuda_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="there is no CUDA device") as found:
        resources.compute_device("cuda")
    assert found.value.exit_code == 5


def test_the_plan_is_printed_and_nothing_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "plan", "--target", "snapdragon"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    for row in ("peak memory", "activations", "disk, at most", "time, alone on this machine", "artifact"):
        assert re.search(rf"{row} .*[0-9]", done.stdout), row
    assert not (tmp_path / "out").exists()


def test_how_far_off_is_told_in_percent(checkpoint: Checkpoint) -> None:
    quantizing = cost(checkpoint, Recipe(), on_disk=False, rate=1e11)
    planned = resources.Resources(quantizing, memory=2e9, seconds=100, disk=0)
    said = resources.how_far_off(planned, 1.5e9, 130)
    assert said == "Planned 2.00 GB of memory and 100 s; it took 1.50 GB (25% less) and 130 s (30% more)."
