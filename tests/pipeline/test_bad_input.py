"""Every bad input through the command line: the exit code, what the message names, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.command_line import call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model")


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def shard(model: Path, file: str) -> None:
    """Replace the one file by an index that names `file` for every tensor."""
    weight_map = dict.fromkeys(load_file(model / "model.safetensors"), file)
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


class RunsCode:
    """Pickled as a call of os.system."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


def evil_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"model.norm.weight": RunsCode(f"touch {model / 'pwned'}")}, file)


def poison(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    return lambda model: edit_tensors(model, change)


UP = "model.layers.1.mlp.up_proj.weight"
BAD_MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda m: (m / "config.json").unlink(), ["config.json"]),
    "broken config": (lambda m: (m / "config.json").write_text("{"), ["config.json"]),
    "unknown architecture": (lambda m: edit_config(m, architectures=["GptForCausalLM"]), ["GptForCausalLM"]),
    "unknown rope": (
        lambda m: edit_config(m, rope_scaling={"type": "yarn", "factor": 2.0}),
        ["yarn", "config.json"],
    ),
    "missing tensor": (lambda m: edit_tensors(m, lambda t: t.pop(UP)), [UP]),
    "extra tensor": (lambda m: edit_tensors(m, lambda t: t.update(more=torch.ones(1))), ["more"]),
    "wrong shape": (
        lambda m: edit_tensors(m, lambda t: t.update({UP: torch.ones(128, 63)})),
        [UP, "63", "64"],
    ),
    "shard outside": (lambda m: shard(m, "../model-00001-of-00001.safetensors"), ["../model-00001"]),
    "shard missing": (lambda m: shard(m, "model-00002-of-00001.safetensors"), ["model-00002"]),
    "truncated": (cut, ["model.safetensors"]),
    "corrupt": (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 999), ["model.safetensors"]),
    "pickle with code": (evil_pickle, ["pytorch_model.bin"]),
    "NaN": (poison(float("nan")), [UP]),
    "Inf": (poison(float("inf")), [UP]),
    "no tokenizer": (lambda m: (m / "tokenizer.model").unlink(), ["tokenizer"]),
    "tokenizer too large": (
        lambda m: edit_tensors(
            m,
            lambda t: t.update({n: t[n][:6000].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}),
        ),
        ["tokenizer", "6144", "6000"],
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_checkpoints(name: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, told = BAD_MODELS[name]
    spoil(model)
    out = tmp_path / "dist"
    arguments = ["--target", "generic-arm64", "--model", str(model), "--out", str(out), "--samples", "4"]
    assert call(*arguments) == 2
    message = capfd.readouterr().err
    assert "error:" in message
    assert "fix:" in message
    assert "Traceback" not in message
    for words in told:
        assert words in message
    assert not out.exists()
    assert not (model / "pwned").exists()


TYPO = Path(__file__).parents[1] / "data" / "typo.yaml"
DRY = ["--dry-run", "--target", "generic-arm64"]
BAD_OPTIONS: dict[str, tuple[list[str], int, list[str]]] = {
    "no target": (["--bits", "4"], 2, ["--target"]),
    "unknown target": (["--target", "snapdragoon"], 2, ["snapdragoon", "snapdragon"]),
    "unknown soc": (["--target", "snapdragon", "--soc", "sm9999"], 2, ["sm9999", "sm8650"]),
    "no model": (["--target", "generic-arm64", "--model", "nowhere"], 2, ["nowhere"]),
    "no calibration": (["--target", "generic-arm64", "--calibration", "none.txt"], 2, ["none.txt"]),
    "no eval text": (["--target", "generic-arm64", "--eval", "none.txt"], 2, ["none.txt"]),
    "no budget": (["--target", "generic-arm64", "--budget", "none.yaml"], 2, ["none.yaml"]),
    "unknown recipe": (["--target", "generic-arm64", "--recipe", "w5"], 2, ["w5", "w4-g32"]),
    "name with a path": (["--target", "generic-arm64", "--name", "a/b"], 2, ["a/b"]),
    "context too long": (["--target", "generic-arm64", "--context", "4096"], 2, ["4096", "2048"]),
    "unknown option": (["--target", "generic-arm64", "--bit", "4"], 2, ["--bit"]),
    "no ranges": (["--target", "generic-arm64", "--activation-bits", "8"], 2, ["--activation-bits"]),
    "unknown key": (["--target", "generic-arm64", "--recipe", str(TYPO)], 2, ["group_sise", "group_size"]),
    "bad width": (["--target", "generic-arm64", "--bits", "5"], 2, ["5"]),
    "option before command": (["--bits", "4", "targets"], 2, ["--bits", "targets"]),
    "dry run, no runner": ([*DRY, "--device", "X1", "--runner-config", "none.yaml"], 2, ["none.yaml"]),
    "dry run, no history": ([*DRY, "--history", str(TYPO)], 2, ["history", "typo.yaml"]),
    "dry run, history below a file": ([*DRY, "--history", f"{TYPO}/h.sqlite"], 2, ["history", "typo.yaml"]),
    "dry run, no phone": ([*DRY, "--device", "X1"], 5, ["fix:"]),
    "sweep of an unknown target": (["sweep", "--targets", "generic-arm64,snapdragoon"], 2, ["snapdragoon"]),
    "not a run": (["check", "nowhere"], 2, ["nowhere"]),
    "no run to answer": (["generate", "nowhere", "--prompt", "a"], 2, ["nowhere"]),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, code, told = BAD_OPTIONS[name]
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == code
    message = capfd.readouterr().err
    assert "Traceback" not in message
    for words in told:
        assert words in message
    assert list(tmp_path.iterdir()) == []


def test_the_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capfd.readouterr().out.startswith(f"bluelm-export {version('bluelm-export')}")


def test_three_bits_are_for_no_phone(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w3.yaml").write_text("bits: 3\n")
    recipe = ["--recipe", str(tmp_path / "w3.yaml")]
    out = tmp_path / "dist"
    assert call("--target", "generic-arm64", "--model", str(model), "--out", str(out), *recipe) == 2
    assert "choose 4 or 8 bits" in capfd.readouterr().err
    assert not out.exists()
