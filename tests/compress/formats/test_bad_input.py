"""Bad adapters, quantized folders, widths and text at the command line: exit 2, one message, no files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints.adapters import write_adapter
from tests.support.checkpoints.packed import V1, gptq, write_packed
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.command_line import call

Q = "model.layers.0.self_attn.q_proj"


def gptq_folder(place: Path) -> Path:
    write_packed(place / "packed", gptq, V1 | {"group_size": 32}, group=32, symmetric=True, shape={"vocab": 6144})
    return place / "packed"


def without_scales(place: Path) -> list[str]:
    folder = gptq_folder(place)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: part for name, part in tensors.items() if name != f"{Q}.scales"}, folder / "model.safetensors")
    return ["--model", str(folder)]


def broken_groups(place: Path) -> list[str]:
    """Scales of 3 groups for 64 columns."""
    folder = gptq_folder(place)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.scales"] = torch.ones(3, 64, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    return ["--model", str(folder)]


def method(name: str) -> Callable[[Path], list[str]]:
    def spoil(place: Path) -> list[str]:
        folder = gptq_folder(place)
        data = json.loads((folder / "config.json").read_text())
        data["quantization_config"]["quant_method"] = name
        (folder / "config.json").write_text(json.dumps(data))
        return ["--model", str(folder)]

    return spoil


def bad_scales(place: Path) -> list[str]:
    folder = gptq_folder(place)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.scales"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    return ["--model", str(folder)]


def other_adapter(place: Path) -> list[str]:
    """An adapter of a model 96 wide inside; this one is 128."""
    write_adapter(place / "adapter")
    return ["--model", str(tiny_checkpoint(place / "tiny")), "--adapter", str(place / "adapter")]


def adapter_on_codes(place: Path) -> list[str]:
    write_adapter(place / "adapter")
    return ["--model", str(gptq_folder(place)), "--adapter", f"{place / 'adapter'}:0.5"]


def text(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def spoil(place: Path) -> list[str]:
        (place / name).write_bytes(content)
        return ["--model", str(tiny_checkpoint(place / "tiny")), "--calibration", str(place / name)]

    return spoil


def junk_folder(*names: str) -> Callable[[Path], list[str]]:
    def spoil(place: Path) -> list[str]:
        (place / "junk").mkdir()
        for name in names:
            (place / "junk" / name).write_bytes(random.Random(name).randbytes(5000))
        return ["--model", str(tiny_checkpoint(place / "tiny")), "--calibration", str(place / "junk")]

    return spoil


def options(*given: str) -> Callable[[Path], list[str]]:
    return lambda place: ["--model", str(tiny_checkpoint(place / "tiny")), *given]


def three_bits(place: Path) -> list[str]:
    (place / "three.yaml").write_text("bits: 3\n")
    return ["--model", str(tiny_checkpoint(place / "tiny")), "--recipe", str(place / "three.yaml")]


CASES: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "adapter for other shapes": (other_adapter, ["lora_A", "[4, 96]", "[4, 128]"]),
    "adapter that is none": (options("--adapter", "nowhere"), ["nowhere", "not a LoRA adapter"]),
    "adapter with a strange weight": (options("--adapter", "nowhere:much"), ["much", "not a weight"]),
    "adapter on a quantized checkpoint": (adapter_on_codes, ["cannot be merged", "float checkpoint"]),
    "GPTQ without scales": (without_scales, [f"{Q}.scales is missing"]),
    "GPTQ with groups that do not divide": (broken_groups, [Q, "3 groups", "64 columns"]),
    "GPTQ with NaN scales": (bad_scales, [Q, "are not finite"]),
    "unknown quant_method": (method("gptqq"), ["gptqq", "did you mean 'gptq'"]),
    "quant_method of no use": (method("bitsandbytes"), ["bitsandbytes", "compressed-tensors"]),
    "group size that does not divide": (options("--group-size", "128"), ["128 does not divide", "64 columns"]),
    "3 bits as an option": (options("--bits", "3"), ["--bits", "3"]),
    "3 bits in a recipe": (three_bits, ["3 bits", "4 or 8"]),
    "empty calibration file": (text("empty.txt", b""), ["empty.txt", "no text"]),
    "text shorter than a token": (text("short.jsonl", b'{"text": " "}\n{"text": ""}\n'), ["short.jsonl", "no text"]),
    "windows shorter than two tokens": (options("--length", "1"), ["--length", "greater than or equal to 2"]),
    "binary junk in .txt": (junk_folder("a.txt", "b.txt"), ["a.txt", "UTF-8"]),
    "binary junk in .jsonl": (junk_folder("a.jsonl"), ["a.jsonl"]),
    "a folder of other files": (junk_folder("a.bin", "b.png"), ["junk", ".txt"]),
}  # fmt: skip


@pytest.mark.parametrize("command", ["run", "quantize"])
@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, told = CASES[name]
    given = spoil(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    if command == "run":
        arguments = ["--target", "generic-arm64", "--out", str(tmp_path / "out"), *given]
    else:
        at = given.index("--model")
        arguments = ["quantize", given[at + 1], str(tmp_path / "out"), *given[:at], *given[at + 2 :]]
        if name == "3 bits in a recipe":  # for comparing quantizers: only formats and targets refuse
            arguments += ["--format", "gptq", "--method", "rtn"]
            told = ["3-bit"]
    assert call(*arguments) == 2
    message = capfd.readouterr().err
    assert message.count("error: ") + message.count("─ Error ─") == 1, message
    assert "Traceback" not in message
    for words in told:
        assert words in message, message
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "something was left behind"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--format", "awq", "--bits", "8"], "no 8-bit codes"),
        (["--format", "gguf"], "gguf"),
        (["--format", "awq", "--bits", "auto"], "AWQ has one width"),
        (["--format", "gptq", "--bits", "auto", "--size", "1MB"], "--size cannot be held"),
    ],
)
def test_formats_that_cannot_be_written(
    more: list[str], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "tiny")
    assert call("quantize", str(model), str(tmp_path / "out"), *more) == 2
    assert told in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_from_the_command_line_to_another_tools_folder_and_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "awq"
    assert call("quantize", str(model), str(out), "--format", "awq", "--method", "rtn") == 0
    assert "(awq)" in capfd.readouterr().err
    assert call("quantize", str(model), str(out), "--format", "awq", "--method", "rtn") == 2
    assert "the output exists" in capfd.readouterr().err
    assert call("quantize", str(out), str(tmp_path / "gptq"), "--format", "gptq") == 0
    assert call("quantize", str(out), str(tmp_path / "x"), "--bits", "8") == 2
    assert "--bits cannot be chosen" in capfd.readouterr().err
    assert call("--target", "generic-arm64", "--model", str(tmp_path / "gptq"), "--dry-run") == 0
    assert "codes as given" in capfd.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq", "gptq", "tiny"]


def test_codes_outlive_a_format_that_cannot_hold_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Found after all the work: they stay, and serve another try."""
    model, out = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e5
    save_file(tensors, model / "model.safetensors")
    words = ["quantize", str(model), str(out), "--method", "rtn", "--no-rotate"]
    for _ in range(2):
        assert call(*words, "--format", "gptq") == 2
        assert "lm_head.weight has values beyond float16" in capfd.readouterr().err
    codes = tmp_path / "out.codes"
    assert (codes / "quantized.json").is_file() and not out.exists()
    (codes / "notes.txt").write_text("mine")
    assert call(*words, "--format", "gptq") == 2
    assert "did not write: notes.txt" in capfd.readouterr().err and (codes / "notes.txt").is_file()
