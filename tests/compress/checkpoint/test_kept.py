"""Work is never lost: what is kept of a run is checked when it is used, and nothing else is removed."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from calibration.ranks import ALONE
from calibration.samples import Samples, load_samples
from compress.checkpoint import work
from compress.checkpoint.store import EMBEDDING_FILE, HEAD_FILE, MANIFEST, block_file
from compress.checkpoint.work import LOCK, SHA256_BYTES, Work
from compress.engine import quantize
from compress.recipe import Recipe
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.quantizing import Stopping, content


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small model of two blocks."""
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("short") / "float", layers=2))


@pytest.fixture(scope="module")
def samples(short: Checkpoint) -> Samples:
    return load_samples(None, short.tokenizer(), 2, 16, 0)


def recipe(**values: Any) -> Recipe:
    return Recipe.make({"samples": 2, "length": 16, "sweeps": 0, **values})


def test_nothing_is_left_of_a_run_that_made_nothing(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    def broken() -> None:
        raise InputError("cannot be read")

    checkpoint = replace(short)
    object.__setattr__(checkpoint, "embedding", broken)
    with pytest.raises(InputError, match="cannot be read"):
        quantize(checkpoint, samples, recipe(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_read_costs_no_finished_block(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    """EIO once, in the second block: the same command goes on behind the first, to the same bytes."""
    whole = content(quantize(short, samples, recipe(), tmp_path / "whole").folder)
    failing, reads = replace(short), list[int]()

    def block(index: int) -> dict[str, torch.Tensor]:
        reads.append(index)
        if reads.count(1) == 1 and index == 1:
            raise InputError("the file is truncated or corrupt: Input/output error", where=short.folder)
        return short.block(index)

    object.__setattr__(failing, "block", block)
    with pytest.raises(InputError, match="Input/output"):
        quantize(failing, samples, recipe(), tmp_path / "out")
    assert content(quantize(failing, samples, recipe(), tmp_path / "out").folder) == whole
    assert reads == [0, 1, *range(1, short.config.num_layers)]


@pytest.mark.parametrize("name", [EMBEDDING_FILE, block_file(0), "streams"])
def test_a_flipped_bit_in_what_is_kept_is_found(short: Checkpoint, samples: Samples, tmp_path: Path, name: str) -> None:
    """Between two runs, size and time stamp kept: it is made again, and the bytes are those of an undisturbed run."""
    whole = content(quantize(short, samples, recipe(), tmp_path / "whole").folder)
    with pytest.raises(KeyboardInterrupt):
        quantize(short, samples, recipe(), tmp_path / "out", Stopping(2))
    kept = (path for path in (tmp_path / "out.partial").iterdir() if path.suffix != ".sha256")
    path = next(path for path in kept if path.name.startswith(name))
    data, before = bytearray(path.read_bytes()), path.stat()
    data[-100] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content(quantize(short, samples, recipe(), tmp_path / "out").folder) == whole


def test_a_nan_in_a_kept_stream_costs_no_finished_block(
    short: Checkpoint, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept with its right digest, as where memory failed before it was written: the blocks give the stream again."""
    whole = content(quantize(short, samples, recipe(), tmp_path / "whole").folder)
    with pytest.raises(KeyboardInterrupt):
        quantize(short, samples, recipe(), tmp_path / "out", Stopping(2))
    (path,) = (tmp_path / "out.partial").glob("streams-*.bin")
    data = bytearray(path.read_bytes()[:-SHA256_BYTES])
    data[-4:] = struct.pack("<f", math.nan)
    path.write_bytes(data + hashlib.sha256(data).digest())
    written, original = list[str](), work.write_piece
    monkeypatch.setattr(work, "write_piece", lambda path, *rest: written.append(path.name) or original(path, *rest))
    assert content(quantize(short, samples, recipe(), tmp_path / "out").folder) == whole
    assert written == [block_file(1), HEAD_FILE]


def test_weights_replaced_meanwhile_are_noticed(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    folder = tmp_path / "trained-on"
    shutil.copytree(short.folder, folder)
    checkpoint = Checkpoint.open(folder)

    class Training(Stopping):
        def advance(self, steps: int = 1, note: str = "") -> None:
            if note == "block 0":
                tensors = load_file(folder / "model.safetensors")
                tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
                save_file(tensors, folder / "model.safetensors")

    with pytest.raises(InputError, match="changed while it was read"):
        quantize(checkpoint, samples, recipe(), tmp_path / "out", Training(99))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained-on"]


@pytest.mark.parametrize("damage", ["a file of yours", "a foreign manifest", "a flipped bit"])
def test_a_folder_that_is_not_ours_alone_is_not_replaced(
    short: Checkpoint, samples: Samples, tmp_path: Path, damage: str
) -> None:
    out = quantize(short, samples, recipe(), tmp_path / "out").folder
    if damage == "a file of yours":
        (out / "notes.txt").write_text("mine")
    elif damage == "a foreign manifest":
        (out / MANIFEST).write_text('{"format": "another"}')
        (out / "notes.txt").write_text("mine")
    else:
        data = bytearray((out / block_file(0)).read_bytes())
        data[-1] ^= 1
        (out / block_file(0)).write_bytes(data)
    before = content(out)
    other = recipe(seed=7)
    with pytest.raises(InputError) as refused:
        quantize(short, samples, other, out)
    assert content(out) == before
    assert ("--overwrite" in str(refused.value)) == (damage != "a foreign manifest")  # no remedy that is refused
    if damage == "a flipped bit":  # all of it is named in our manifest
        assert quantize(short, samples, other, out, overwrite=True).recipe.seed == 7
        return
    with pytest.raises(InputError, match="bluelm-export did not write"):
        quantize(short, samples, other, out, overwrite=True)
    assert content(out) == before


def test_two_at_once_do_not_share_a_folder(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    class Second(Stopping):
        def advance(self, steps: int = 1, note: str = "") -> None:
            if note == "block 0":
                with pytest.raises(InputError, match="another process"):
                    quantize(short, samples, recipe(), tmp_path / "out")
                self.tried = True

    first = Second(99)
    quantize(short, samples, recipe(), tmp_path / "out", first)
    assert first.tried


def test_a_folder_that_is_removed_meanwhile_is_told(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    class Removing(Stopping):
        def advance(self, steps: int = 1, note: str = "") -> None:
            if note == "block 1":
                shutil.rmtree(tmp_path / "out.partial")

    with pytest.raises(InputError, match=r"out\.partial"):
        quantize(short, samples, recipe(), tmp_path / "out", Removing(99))


def test_a_link_is_no_output(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with pytest.raises(InputError, match="symbolic link"):
        quantize(short, samples, recipe(), tmp_path / "out")


@pytest.mark.parametrize("mine", ["notes.json/mine.txt", "additional_chat_templates/mine.txt"])
def test_folders_in_an_unfinished_run_are_not_removed_with_it(tmp_path: Path, mine: str) -> None:
    partial = tmp_path / "out.partial"
    (partial / "additional_chat_templates").mkdir(parents=True)
    (partial / "additional_chat_templates" / "tool_use.jinja").write_text("ours")
    (partial / "chat_template.jinja").write_text("ours")
    (partial / mine).parent.mkdir(exist_ok=True)
    (partial / mine).write_text("mine")
    before = {path: path.is_file() for path in partial.rglob("*")}
    with pytest.raises(InputError, match="no run of ours wrote"):
        Work(tmp_path / "out", {"a": 1}, ALONE, overwrite=True)
    assert {path: path.is_file() for path in partial.rglob("*") if path.name != LOCK} == before
    (partial / mine).unlink()
    if (partial / "notes.json").is_dir():
        (partial / "notes.json").rmdir()
    Work(tmp_path / "out", {"a": 1}, ALONE, overwrite=True).close()
    assert not list(partial.rglob("*.jinja"))


def test_a_flipped_bit_anywhere_in_a_finished_manifest_is_found(
    short: Checkpoint, samples: Samples, tmp_path: Path
) -> None:
    """In what it notes of layers and calibration, too, that nothing else is held against."""
    path = quantize(short, samples, recipe(), tmp_path / "out").folder / MANIFEST
    whole = path.read_bytes()
    for place in range(0, len(whole), 53):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(InputError) as caught:
            quantize(short, samples, recipe(), tmp_path / "out")
        assert str(tmp_path / "out") in str(caught.value)
    path.write_bytes(whole)
    assert quantize(short, samples, recipe(), tmp_path / "out").folder == path.parent
