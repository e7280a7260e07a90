"""Checkpoints that cannot be used: each is refused by name, with a remedy, and nothing crashes or runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from tests.support.checkpoints.shapes import random_tensors, write_checkpoint, write_tensors

SMALL: dict[str, Any] = {"layers": 1, "hidden": 8, "inner": 8, "heads": 2, "kv_heads": 1, "vocab": 16}
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def refused(folder: Path, *said: str) -> None:
    """Opening the folder and reading all of it fails, with all of `said` in the message."""
    with pytest.raises(InputError) as caught:
        read_all(folder)
    assert caught.value.exit_code == 2
    assert caught.value.where is not None
    for text in said:
        assert text in str(caught.value)


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.tensors:
        checkpoint.tensor(name)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tokenizer=False, **SMALL)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tokenizer=False, shards=2, **SMALL)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], file_format: Any = "safetensors") -> None:
    tensors = random_tensors(ModelConfig.from_folder(folder))
    change(tensors)
    write_tensors(folder, tensors, file_format=file_format)


def test_no_weights(small: Path) -> None:
    (small / "model.safetensors").unlink()
    refused(small, "no weights", "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(UP), [f"{UP} is missing"]),
        (lambda t: t.pop(EMBED), [f"{EMBED} is missing"]),
        (lambda t: t.pop(HEAD), [f"{HEAD} is missing", "tie_word_embeddings"]),
        (lambda t: t.update(extra=torch.ones(2)), ["extra does not belong to this model"]),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(2)}), ["layers.1.mlp.up_proj"]),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(2)}), ["quantized"]),
        (lambda t: t.update({UP: torch.ones(8, 4)}), [UP, "[8, 4]", "[8, 8]"]),
        (lambda t: t.update({UP: torch.ones(64)}), [UP, "[64]", "[8, 8]"]),
        (lambda t: t.update({UP: torch.ones(())}), [UP, "[]", "[8, 8]"]),
        (lambda t: t.update({EMBED: torch.ones(8)}), [EMBED, "not [rows, hidden]"]),
        (lambda t: t.update({EMBED: torch.ones(0, 8)}), [EMBED, "not [rows, hidden]"]),
        (lambda t: t.update({HEAD: torch.ones(15, 8)}), [HEAD, "[15, 8]", "[16, 8]"]),
        (lambda t: t.update({UP: torch.ones(8, 8, dtype=torch.int32)}), [UP, "not floating point"]),
        (lambda t: t.update({UP: torch.ones(8, 8).to(torch.float8_e4m3fn)}), [UP, "not floating point"]),
        (lambda t: t[UP][3].fill_(torch.nan), [f"{UP} has 8 NaN or infinite values of 64"]),
        (lambda t: t[UP][3, 3:5].fill_(-torch.inf), [f"{UP} has 2 NaN or infinite"]),
        (lambda t: t.update({UP: torch.full((8, 8), 1e300, dtype=torch.float64)}), [f"{UP} has 64 NaN"]),
    ],
)
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_tensors(small: Path, change: Any, said: list[str], file_format: Literal["safetensors", "bin"]) -> None:
    (small / "model.safetensors").unlink()
    rewrite(small, change, file_format)
    refused(small, *said)


def test_large_finite_values_are_no_infinities(small: Path) -> None:
    rewrite(small, lambda tensors: tensors[UP].fill_(3e38))  # their sum overflows
    read_all(small)


def test_layer_norm_that_the_config_does_not_know(small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"use_stable_embedding": False}))
    refused(small, "model.embed_layer_norm.bias does not belong", "use_stable_embedding to true")


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    names = json.loads(path.read_text())["weight_map"]
    change(names)
    path.write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update({HEAD: "model-9.safetensors"}), ["'model-9.safetensors' is missing"]),
        (lambda m: m.update({HEAD: "../outside.safetensors"}), ["points outside"]),
        (lambda m: m.update({HEAD: "../checkpoint-2/outside.safetensors"}), ["points outside"]),
        (lambda m: m.update({HEAD: "/etc/hostname"}), ["points outside"]),
        (lambda m: m.update({HEAD: "a\0b"}), ["cannot be opened"]),
        (lambda m: m.update({HEAD: "x" * 5000}), ["cannot be opened"]),
        (lambda m: m.update({HEAD: ""}), ["not a regular file"]),
        (lambda m: m.update({HEAD: 3}), ["weight_map must name a file"]),
        (lambda m: m.update({HEAD: None}), ["weight_map must name a file"]),
        (lambda m: m.update({HEAD: ["a"]}), ["weight_map must name a file"]),
        (lambda m: m.clear(), ["weight_map must name a file"]),
        (lambda m: m.update({"phantom": m[HEAD]}), ["phantom is missing from", "where the index puts it"]),
        (
            lambda m: m.update({HEAD: next(file for file in m.values() if file != m[HEAD])}),
            [f"the index puts {HEAD} into"],
        ),
    ],
)
def test_indexes(sharded: Path, tmp_path: Path, change: Any, said: list[str]) -> None:
    outside = (sharded / "model-00001-of-00002.safetensors").read_bytes()
    (tmp_path / "outside.safetensors").write_bytes(outside)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "outside.safetensors").write_bytes(outside)
    edit_index(sharded, change)
    refused(sharded, *said)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": "model.safetensors"}'])
def test_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    second.write_bytes(first.read_bytes())
    refused(sharded, "is in two shards")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "'model-00002-of-00002.safetensors' is missing")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_that_lead_out(small: Path, tmp_path: Path, name: str) -> None:
    (small / name).rename(tmp_path / name)
    (small / name).symlink_to(tmp_path / name)
    refused(small, "points outside the checkpoint's folder")


def test_hub_layout_is_no_way_out(small: Path, tmp_path: Path) -> None:
    """Only the repository's own blobs are reachable from a snapshot."""
    snapshot = tmp_path / "repo" / "snapshots" / "1"
    snapshot.parent.mkdir(parents=True)
    small.rename(snapshot)
    (snapshot / "model.safetensors").rename(tmp_path / "repo" / "model.safetensors")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "repo" / "model.safetensors")
    refused(snapshot, "points outside")


def test_link_loops_folders_and_pipes(small: Path) -> None:
    weights = small / "model.safetensors"
    weights.unlink()
    weights.mkdir()
    refused(small, "not a regular file")
    weights.rmdir()
    os.mkfifo(weights)
    refused(small, "not a regular file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        struct.pack("<Q", 0),
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 60_000) + b"[" * 60_000,
    ],
)
def test_safetensors_that_are_none(small: Path, content: bytes) -> None:
    (small / "model.safetensors").write_bytes(content)
    refused(small)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 2**63]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-4, 12]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "F33", "shape": [2, 2], "data_offsets": [0, 16]},
        {"shape": [2, 2], "data_offsets": [0, 16]},
        {},
        7,
    ],
)
def test_headers_that_lie(small: Path, entry: Any) -> None:
    header = json.dumps({EMBED: entry}).encode()
    (small / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(small, "truncated or corrupt", "model.safetensors")


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cuts, changed and moved bytes, mostly in the first third of a file, where headers are."""
    kind = draw(st.sampled_from(["cut", "change", "drop", "insert"]))
    place, size = draw(st.floats(0, 1)), draw(st.integers(1, 9))
    value = draw(st.binary(min_size=size, max_size=size))

    def damage(content: bytes) -> bytes:
        at = int(place**2 * (len(content) - 1))
        if kind == "cut":
            return content[:at]
        return content[:at] + (b"" if kind == "drop" else value) + content[at + (kind != "insert") * size :]

    return damage


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(damage=damages(), file_format=st.sampled_from(["safetensors", "bin"]))
def test_damaged_files_are_refused_or_still_good(tmp_path: Path, damage: Any, file_format: Any) -> None:
    folder = tmp_path / file_format
    if not folder.exists():
        write_checkpoint(folder, tokenizer=False, file_format=file_format, **SMALL)
        file = next(folder.glob("*model*"))
        (folder / "good").write_bytes(file.read_bytes())
    file = next(folder.glob("*model*"))
    file.write_bytes(damage((folder / "good").read_bytes()))
    try:  # bytes of a tensor may change unnoticed, so reading may also succeed
        read_all(folder)
    except InputError as error:
        assert error.where is not None


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("left", [0.01, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, file_format: Any, left: float) -> None:
    write_checkpoint(tmp_path, tokenizer=False, file_format=file_format, **SMALL)
    file = next(tmp_path.glob("*model*"))
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    refused(tmp_path, "truncated or corrupt", file.name)


class Runs:
    """Unpickling this runs a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.trace}'",)


@pytest.fixture
def bin_folder(small: Path) -> Path:
    (small / "model.safetensors").unlink()
    return small


def test_pickle_that_runs_code(bin_folder: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(random_tensors(ModelConfig.from_folder(bin_folder)))
    trace = tmp_path / "ran"
    torch.save(tensors | {UP: Runs(trace)}, bin_folder / "pytorch_model.bin")
    refused(bin_folder, "wants to run code", "it was not run", "pytorch_model.bin", "safetensors")
    assert not trace.exists()
    torch.load(bin_folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # the pickle was a real one


def test_bare_pickle_that_runs_code(bin_folder: Path, tmp_path: Path) -> None:
    """Also under the name of a safetensors file, or without the zip around it."""
    trace = tmp_path / "ran"
    for name in ("pytorch_model.bin", "model.safetensors"):
        (bin_folder / name).write_bytes(pickle.dumps({UP: Runs(trace)}))
        refused(bin_folder, name)
        torch.save({UP: Runs(trace)}, bin_folder / name)
        refused(bin_folder, name)
    assert not trace.exists()


@pytest.mark.parametrize(
    "state",
    [
        {UP: argparse.Namespace(a=1)},
        {UP: 3},
        {"state_dict": {UP: torch.ones(8, 8)}},
        {3: torch.ones(8, 8)},
        [torch.ones(8, 8)],
        torch.ones(8, 8),
        {UP: torch.ones(8, 8).to_sparse()},
        {UP: torch.ones(8, 8, device="meta")},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bins_that_hold_something_else(bin_folder: Path, state: Any) -> None:
    torch.save(state, bin_folder / "pytorch_model.bin")
    refused(bin_folder, "pytorch_model.bin")


def test_bins_of_other_kinds(bin_folder: Path) -> None:
    path = bin_folder / "pytorch_model.bin"
    torch.save({UP: torch.ones(8, 8)}, path, _use_new_zipfile_serialization=False)
    refused(bin_folder, "convert it to safetensors")
    path.unlink()
    rewrite(bin_folder, lambda tensors: None, "bin")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(bin_folder, "compressed")


def test_file_that_changes_after_opening(small: Path) -> None:
    checkpoint = Checkpoint.open(small)
    rewrite(small, lambda tensors: tensors.update({UP: torch.ones(4, 8)}))
    with pytest.raises(InputError, match="changed its shape"):
        checkpoint.tensor(UP)
    (small / "model.safetensors").unlink()
    with pytest.raises(InputError, match="corrupt"):
        checkpoint.tensor(UP)


def test_unknown_name(small: Path) -> None:
    with pytest.raises(InputError, match="there is no tensor nothing"):
        Checkpoint.open(small).tensor("nothing")
