"""The store: codes come back as they went in, and damage is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.model import Decoder
from bluelm.system.files import demo_checkpoint
from compress.checkpoint.packing import pack, unpack
from compress.checkpoint.pieces import Piece, read_header, read_linear, read_vector, write_piece
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import MANIFEST, QuantizedCheckpoint
from compress.checkpoint.work import finished
from compress.engine import quantize
from compress.recipe import Recipe
from tests.support.checkpoints.shapes import shortened


@given(seed=st.integers(0, 10_000), bits=st.sampled_from((4, 8)), rows=st.integers(1, 5), columns=st.integers(1, 9))
def test_packing_round_trip(seed: int, bits: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_packing_order_is_even_column_low() -> None:
    assert pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x43]]


def random_weight(bits: int, group_size: int, symmetric: bool) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (6, 96), generator=generator, dtype=torch.uint8)
    groups = 1 if group_size == -1 else 96 // group_size
    scales = torch.rand(6, groups, generator=generator).to(torch.float16)
    zeros = torch.full((6, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 2**bits, (6, groups), generator=generator, dtype=torch.uint8)
    return QuantizedTensor(codes, scales, zeros, bits, group_size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, -1), (8, 32), (8, -1)])
def test_piece_round_trip(tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
    weight, vector = random_weight(bits, group_size, symmetric), torch.randn(5)
    path = tmp_path / "piece.safetensors"
    piece = Piece({"a.b": weight}, {"a.norm": vector}, {"a.b": {"loss": 0.25}})
    write_piece(path, piece, "f" * 64)
    header = read_header(path)
    assert header.fingerprint == "f" * 64
    assert header.notes == {"a.b": {"loss": 0.25}}
    assert header.vectors == ("a.norm",)
    info = header.linears["a.b"]
    assert (info.shape, info.bits, info.group_size, info.symmetric) == ((6, 96), bits, group_size, symmetric)
    found = read_linear(path, "a.b", info)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scales, weight.scales)
    assert torch.equal(found.zeros, weight.zeros)
    assert torch.equal(found.dequantize(), weight.dequantize())
    assert torch.equal(read_vector(path, "a.norm"), vector)
    again = tmp_path / "again.safetensors"
    write_piece(again, piece, "f" * 64)
    assert again.read_bytes() == path.read_bytes()


@pytest.fixture
def stored(tmp_path: Path) -> QuantizedCheckpoint:
    source = shortened(demo_checkpoint(), 1, tmp_path / "float")
    return quantize(Checkpoint.open(source), None, Recipe.make({"method": "rtn"}), tmp_path / "q")


def test_quantized_checkpoint_is_weights_of_a_decoder(stored: QuantizedCheckpoint, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tmp_path / "float")
    opened = QuantizedCheckpoint.open(stored.folder)
    assert opened.config == checkpoint.config
    assert opened.recipe == Recipe.make({"method": "rtn"})
    assert opened.digest() == stored.digest()
    opened.verify()
    tensors, exact = opened.block(0), checkpoint.block(0)
    assert tensors.keys() == exact.keys()
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, exact[name])
            assert torch.equal(opened.vector(f"model.layers.0.{name}"), exact[name])
        else:
            weight = opened.linear(f"model.layers.0.{name.removesuffix('.weight')}")
            assert torch.equal(tensor, weight.dequantize())
            assert (tensor - exact[name]).abs().max() < 0.2 * exact[name].abs().max()
    assert torch.equal(opened.head(), opened.linear("lm_head").dequantize())
    assert opened.linear("lm_head").group_size == -1
    assert opened.embed().bits == 8
    torch.testing.assert_close(opened.embedding(), checkpoint.embedding(), rtol=0, atol=0.05)
    tokens = opened.tokenizer().encode("你好, world", bos=True)
    logits = Decoder.from_weights(opened)(torch.tensor([tokens]))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.7.mlp.up_proj", ""])
def test_unknown_names_are_refused(stored: QuantizedCheckpoint, name: str) -> None:
    with pytest.raises(InputError, match="no quantized weight"):
        stored.linear(name)
    with pytest.raises(InputError, match="no vector"):
        stored.vector(name)


def test_damage_is_told(stored: QuantizedCheckpoint) -> None:
    folder = stored.folder
    block = folder / "block-00000.safetensors"
    whole = block.read_bytes()
    changed = bytearray(whole)
    changed[-100] ^= 1
    block.write_bytes(changed)
    with pytest.raises(InputError, match="changed after it was made"):
        stored.verify()
    block.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="block-00000"):
        QuantizedCheckpoint.open(folder)
    block.unlink()
    with pytest.raises(InputError, match="missing"):
        QuantizedCheckpoint.open(folder)
    block.write_bytes(whole)
    QuantizedCheckpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda info: info.update(version=99), "version 99"),
        (lambda info: info.pop("format"), "expected bluelm-quantized"),
        (lambda info: info["recipe"].update(bits=5), "bits = 5"),
        (lambda info: info["recipe"].update(bitz=4), "bitz"),
        (lambda info: info.pop("recipe"), "no recipe"),
        (lambda info: info.update(recipe=[1]), "no recipe"),
        (lambda info: info.pop("files"), "no files"),
    ],
)
def test_bad_manifests_are_refused(stored: QuantizedCheckpoint, change, says: str) -> None:
    path = stored.folder / MANIFEST
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match=says):
        QuantizedCheckpoint.open(stored.folder)


@pytest.mark.parametrize("kind", ["missing", "a pipe", "a folder", "outside"])
def test_a_finished_folder_whose_files_are_none(stored: QuantizedCheckpoint, kind: str) -> None:
    """It was a FileNotFoundError, or waited for the other end of the pipe."""
    path = stored.folder / "tokenizer.model"
    if kind == "outside":
        info = json.loads((stored.folder / MANIFEST).read_text())
        info["files"]["../other"] = "0" * 64
        (stored.folder.parent / "other").write_text("")
        (stored.folder / MANIFEST).write_text(json.dumps(info))
    else:
        path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    if kind == "a folder":
        path.mkdir()
    said = {"missing": "is missing", "outside": "outside the checkpoint's folder"}.get(kind, "not a regular file")
    with pytest.raises(InputError, match=said):
        QuantizedCheckpoint.open(stored.folder).verify()
    with pytest.raises(InputError, match="damaged"):
        finished(stored.folder, {})


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a quantized checkpoint"):
        QuantizedCheckpoint.open(demo_checkpoint())
    with pytest.raises(InputError, match="not a quantized checkpoint"):
        QuantizedCheckpoint.open(tmp_path / "none")


def test_config_that_asks_for_more_than_the_files_hold_is_refused(stored: QuantizedCheckpoint) -> None:
    path = stored.folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 1024}))
    with pytest.raises(InputError, match="mlp"):
        QuantizedCheckpoint.open(stored.folder)


DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"bits": 4', '"bits": 99'),
        ('"bits": 4', '"bits": "4"'),
        ('"bits": 4', f'"bits": {"9" * 5000}'),
        ('"bits": 4', f'"bits": {DEEP}'),
        ('"bits": 4', '"bits": true'),
        ('"group_size": 32', '"group_size": 0'),
        ('"group_size": 32', '"group_size": -7'),
        ('"shape": [8, 64]', '"shape": [8, -64]'),
        ('"shape": [8, 64]', '"shape": [8]'),
        ('"symmetric": true', '"symmetric": 1'),
        ('"notes": {}', '"notes": []'),
        ('"vectors": []', f'"vectors": [], "more": {DEEP}'),
    ],
)
def test_a_header_that_no_weight_can_have_is_damage(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "piece.safetensors"
    weight = QuantizedTensor(
        torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2, dtype=torch.float16),
        torch.full((8, 2), 8, dtype=torch.uint8), 4, 32,
    )  # fmt: skip
    write_piece(path, Piece({"w": weight}), "made so")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert read_header(path).linears["w"].bits == 4
    key, header = next(iter(metadata.items()))
    assert old in header
    save_file(tensors, path, {key: header.replace(old, new)})

    with pytest.raises(InputError, match="piece"):
        read_header(path)
