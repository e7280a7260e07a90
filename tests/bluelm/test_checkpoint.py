"""Checkpoints in every layout, read lazily."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from bluelm.checkpoint import Checkpoint, model_shapes
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.fold import fold_layer_norm
from bluelm.system.files import demo_checkpoint
from tests.support.checkpoints.shapes import config_dict, random_tensors, write_checkpoint, write_tensors


def same_tensors(checkpoint: Checkpoint, seed: int = 0, dtype: torch.dtype = torch.float32) -> bool:
    want = random_tensors(checkpoint.config, seed)
    assert set(checkpoint.tensors) == set(want)
    return all(torch.equal(checkpoint.tensor(name), tensor.to(dtype).float()) for name, tensor in want.items())


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layouts(tmp_path: Path, file_format: Literal["safetensors", "bin"], shards: int, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, file_format=file_format, shards=shards, dtype=dtype, tokenizer=False)
    checkpoint = Checkpoint.open(tmp_path)
    assert same_tensors(checkpoint, dtype=dtype)
    assert {info.dtype for info in checkpoint.tensors.values()} == {str(dtype).removeprefix("torch.")}
    assert len({info.file for info in checkpoint.tensors.values()}) == shards


def test_what_is_read_is_a_copy_of_its_own(tmp_path: Path) -> None:
    """Writing into a tensor changes neither the file nor the next reading."""
    for file_format in ("safetensors", "bin"):
        folder = write_checkpoint(tmp_path / file_format, file_format=file_format, tokenizer=False)
        checkpoint = Checkpoint.open(folder)
        checkpoint.tensor("lm_head.weight").zero_()
        assert same_tensors(Checkpoint.open(folder))


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, seed=1, file_format="bin", tokenizer=False)
    write_checkpoint(tmp_path, seed=2, file_format="safetensors", tokenizer=False)
    assert same_tensors(Checkpoint.open(tmp_path), seed=2)


def test_rows_come_from_the_tensor(tmp_path: Path) -> None:
    """Files of BlueLM-7B-Chat hold 100008 rows where the config says 100096."""
    write_checkpoint(tmp_path, vocab=500, tokenizer=False)
    (tmp_path / "config.json").write_text(json.dumps(config_dict(vocab=512)))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.vocab_size == 500
    assert checkpoint.embedding().shape == checkpoint.head().shape == (500, 64)


def test_block_names_and_shapes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, head_dim=32, tokenizer=False)
    block = Checkpoint.open(tmp_path).block(1)
    assert {name: tuple(tensor.shape) for name, tensor in block.items()} == {
        "input_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (128, 64),
        "self_attn.k_proj.weight": (64, 64),
        "self_attn.v_proj.weight": (64, 64),
        "self_attn.o_proj.weight": (64, 128),
        "post_attention_layernorm.weight": (64,),
        "mlp.gate_proj.weight": (96, 64),
        "mlp.up_proj.weight": (96, 64),
        "mlp.down_proj.weight": (64, 96),
    }


def test_embedding_is_folded(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tokenizer=False))
    raw = random_tensors(checkpoint.config)
    table = raw["model.embed_tokens.weight"].double()
    centred = table - table.mean(1, keepdim=True)
    want = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    want = want * raw["model.embed_layer_norm.weight"] + raw["model.embed_layer_norm.bias"]
    torch.testing.assert_close(checkpoint.embedding(), want.float(), rtol=1e-5, atol=1e-6)


def test_folding_in_pieces_is_folding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    table, weight, bias = (torch.randn(shape, generator=generator) for shape in ((70, 8), (8,), (8,)))
    whole = fold_layer_norm(table.clone(), weight, bias, 1e-6)
    monkeypatch.setattr("bluelm.fold.ROWS_AT_ONCE", 16)
    assert torch.equal(fold_layer_norm(table.clone(), weight, bias, 1e-6), whole)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_tied_head_is_the_table_as_stored(tmp_path: Path, layer_norm: bool) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tied=True, layer_norm=layer_norm, tokenizer=False))
    stored = random_tensors(checkpoint.config)["model.embed_tokens.weight"]
    assert torch.equal(checkpoint.head(), stored)
    assert torch.equal(checkpoint.embedding(), stored) is not layer_norm


def test_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tied=True, tokenizer=False)
    tensors = random_tensors(ModelConfig.from_folder(tmp_path))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(tmp_path, tensors)
    assert torch.equal(Checkpoint.open(tmp_path).head(), tensors["lm_head.weight"])
    assert not Checkpoint.open(tmp_path).warnings
    tensors["lm_head.weight"][3, 3] += 1
    write_tensors(tmp_path, tensors)
    found = Checkpoint.open(tmp_path)
    assert torch.equal(found.head(), tensors["lm_head.weight"])
    assert not found.config.tie_word_embeddings and "differs from the embedding" in found.warnings[0]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    write_tensors(tmp_path, tensors)
    with pytest.raises(InputError, match=r"lm_head.weight has shape \[511, 64\]"):
        Checkpoint.open(tmp_path)


def test_rotary_frequencies_in_the_file_are_skipped(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=False)
    tensors = random_tensors(ModelConfig.from_folder(tmp_path))
    write_tensors(tmp_path, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert same_tensors(Checkpoint.open(tmp_path))


def test_hub_cache(tmp_path: Path) -> None:
    """A snapshot of the Hugging Face hub's cache is links into a folder of blobs."""
    real = write_checkpoint(tmp_path / "repo" / "blobs", tokenizer=False)
    snapshot = tmp_path / "repo" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    assert same_tensors(Checkpoint.open(snapshot))
    assert Checkpoint.open(snapshot).digest() == Checkpoint.open(real).digest()


def test_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "real", tokenizer=False)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert same_tensors(Checkpoint.open(tmp_path / "link"))


def test_digest_follows_every_file(tmp_path: Path) -> None:
    def digest(name: str, **shape: Any) -> str:
        return Checkpoint.open(write_checkpoint(tmp_path / name, **shape)).digest()

    first = digest("a")
    assert first == digest("b")  # the folder's name does not matter
    assert len({first, digest("c", seed=1), digest("d", rope_theta=20000.0), digest("e", tokenizer=False)}) == 4
    (tmp_path / "b" / "notes.txt").write_text("not part of the model")
    assert Checkpoint.open(tmp_path / "b").digest() == first


def test_demo() -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    assert sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values()) == 7_868_160
    assert checkpoint.tokenizer().vocab_size == checkpoint.config.vocab_size == 6144


PEAK = """
import resource, sys
from bluelm.checkpoint import Checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
import torch; torch.ones(8).sum()
before = peak()
checkpoint = Checkpoint.open(sys.argv[1])
for name in sys.argv[2:]: checkpoint.tensor(name)
print(peak() - before)
"""


def peak_growth(folder: Path, *names: str) -> int:
    """MiB of resident memory that opening `folder` and reading the tensors took at most."""
    command = [sys.executable, "-c", PEAK, str(folder), *names]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_7b_is_opened_and_read_lazily(tmp_path: Path) -> None:
    """14.6 GB of bfloat16, a file with a hole: a few norms and one linear cost what the linear costs."""
    data = config_dict(
        vocab=100096,
        hidden=4096,
        inner=11008,
        layers=32,
        heads=32,
        kv_heads=None,
        max_position_embeddings=2048,
    )
    (tmp_path / "config.json").write_text(json.dumps(data))
    shapes = model_shapes(ModelConfig.from_dict(data))
    ends = list(accumulate(2 * torch.Size(shape).numel() for shape in shapes.values()))
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        for (name, shape), start, end in zip(shapes.items(), [0, *ends], ends, strict=False)
    }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + ends[-1])
    assert ends[-1] // 2 == 7_296_266_240  # the parameters of BlueLM-7B
    assert peak_growth(tmp_path, "model.norm.weight") < 64
    linear = 4096 * 4096 * (4 + 2) >> 20  # float32 copy and the mapped bfloat16, MiB
    grown = peak_growth(tmp_path, *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(8)))
    assert grown < linear + 64 + 64  # one at a time: the copy before it may still be held


def test_a_bin_is_memory_mapped(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vocab=300_000, hidden=64, file_format="bin", tokenizer=False)  # 2 tables of 73 MiB
    assert (tmp_path / "pytorch_model.bin").stat().st_size > 140 << 20
    assert peak_growth(tmp_path, "model.norm.weight", "model.layers.1.mlp.up_proj.weight") < 40
