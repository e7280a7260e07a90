"""GGUF artifacts: gguf-py reads back our codes, scales, tokenizer and logits; rows of q and k in llama.cpp's order."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bluelm.config import ModelConfig, RopeScaling
from bluelm.errors import InputError, TargetError
from bluelm.rope import inverse_frequencies
from bluelm.system.files import demo_checkpoint
from compress.checkpoint.store import QuantizedCheckpoint
from compress.methods.grid import choose_grid
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.gguf import export as gguf_file
from export.gguf import readback_vocabulary as gguf_vocabulary
from export.gguf.export import in_file_order, interleaved, pack, rope_factors
from export.gguf.names import architecture
from export.gguf.reader import GgufWeights
from export.gguf.tokenizer import add_tokenizer
from targets.arm64.backends import GgufBackend
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from targets.socs import find_soc
from tests.support.answers import TEXT
from tests.support.checkpoints.rounded import rounded


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("gguf") / "quantized", blocks=2)


@pytest.fixture(scope="module")
def artifact(quantized: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return gguf_file.export(quantized, tmp_path_factory.mktemp("gguf") / "artifact", context=64)


def test_codes_and_scales_in_the_file_are_the_checkpoints(quantized: QuantizedCheckpoint, artifact: Artifact):
    found = GgufWeights(artifact.path("model"), quantized.config)
    for layer in range(2):
        wanted = quantized.linear(f"model.layers.{layer}.mlp.down_proj")
        there = found.quantized(f"blk.{layer}.ffn_down.weight")
        assert torch.equal(there.codes, wanted.codes)
        assert torch.equal(there.scales, wanted.scales)
        for name, tensor in quantized.block(layer).items():
            assert torch.equal(found.block(layer)[name], tensor), name
    head = found.quantized("output.weight")
    assert torch.equal(head.codes, quantized.linear("lm_head").codes)
    assert torch.equal(head.scales, quantized.linear("lm_head").scales.expand(-1, 8))  # 256 columns, blocks of 32
    assert torch.equal(found.embedding(), quantized.embedding())
    assert torch.equal(found.final_norm(), quantized.final_norm())


def test_logits_of_the_file_are_the_dequantized_models(quantized: QuantizedCheckpoint, artifact: Artifact):
    with open_runtime(artifact.folder) as runtime:
        assert np.array_equal(runtime.logits(TEXT), TorchRuntime(quantized, 64).logits(TEXT))
        assert "gguf-py" in runtime.name


def test_the_file_says_what_llama_cpp_asks(quantized: QuantizedCheckpoint, artifact: Artifact):
    fields, config = GgufWeights(artifact.path("model"), quantized.config).fields, quantized.config
    wanted = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": config.hidden_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {key: fields[key].contents() for key in wanted} == wanted
    pieces = fields["tokenizer.ggml.tokens"].contents()
    assert len(pieces) == config.vocab_size
    assert "▁the" in pieces


@given(heads=st.integers(1, 4), pairs=st.integers(1, 4), columns=st.integers(1, 3))
def test_rows_of_q_and_k_are_put_as_llama_cpp_converts_them(heads: int, pairs: int, columns: int):
    rows = torch.arange(heads * 2 * pairs * columns).view(heads * 2 * pairs, columns)
    # written out: position 2j holds row j of a head's first half, 2j + 1 row j of its second
    wanted = [
        rows[head * 2 * pairs + half * pairs + j] for head in range(heads) for j in range(pairs) for half in (0, 1)
    ]
    assert torch.equal(interleaved(rows, heads), torch.stack(wanted))


@pytest.mark.parametrize(("name", "short", "heads"), [("q_proj", "attn_q", 8), ("k_proj", "attn_k", 4)])
def test_heads_of_a_llama_turn_in_neighbouring_pairs(
    name: str, short: str, heads: int, quantized: QuantizedCheckpoint, artifact: Artifact
):
    """The file alone, by gguf-py: row 2j + half of a head is the checkpoint's row half * d/2 + j."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(artifact.path("model")).tensors}
    tensor = tensors[f"blk.1.{short}.weight"]
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(heads, 16, 2, -1)
    wanted = quantized.linear(f"model.layers.1.self_attn.{name}").dequantize().numpy().reshape(heads, 2, 16, -1)
    assert np.array_equal(found[:, :, 0], wanted[:, 0]) and np.array_equal(found[:, :, 1], wanted[:, 1])
    rows = torch.arange(heads * 32.0)
    for source in (f"model.layers.0.self_attn.{name}", f"model.layers.0.self_attn.{name}.bias"):
        assert not torch.equal(in_file_order(quantized.config, source, rows), rows)
        qwen = replace(quantized.config, qkv_bias=True)
        assert torch.equal(in_file_order(qwen, source, rows), rows)  # llama.cpp's qwen2 turns halves
    for source in ("self_attn.v_proj", "mlp.up_proj", "input_layernorm"):
        assert torch.equal(in_file_order(quantized.config, f"model.layers.0.{source}", rows), rows)


def test_what_llama_cpp_computes_of_qwen3(quantized: QuantizedCheckpoint) -> None:
    """Its qwen3 turns plain halves and has no biases; what it cannot is refused before any work."""
    qwen3 = replace(quantized.config, architecture="Qwen3ForCausalLM", rope_scaling=None)
    assert architecture(qwen3) == "qwen3"
    backend, recipe = GgufBackend(), Recipe.make({"method": "rtn"})
    backend.check(find_soc("generic-arm64"), qwen3, recipe, 64, 16)
    for more, said in (({"rope_scaling": RopeScaling("linear", 4.0)}, "scaled rope"), ({"qkv_bias": True}, "biases")):
        with pytest.raises(TargetError, match=f"qwen3 has no .*{said}"):
            backend.check(find_soc("generic-arm64"), replace(qwen3, **more), recipe, 64, 16)


def test_every_row_of_the_table_has_a_token(quantized: QuantizedCheckpoint, tmp_path: Path):
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[X]": 6144}')
    config = replace(quantized.config, vocab_size=6146, eos_token_ids=(7, 2))
    found = written(tmp_path, config)
    assert found["tokens"][6142:] == [*found["tokens"][6142:6144], "[X]", "[unused 6145]"]
    assert (found["token_type"][6144:], found["scores"][6144:]) == ([4, 5], [0.0, 0.0])
    assert [found[f"{name}_token_id"] for name in ("bos", "eos", "eot", "padding", "unknown")] == [1, 2, 7, 3, 0]
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert written(tmp_path, replace(config, eos_token_ids=()))["eos_token_id"] == 2
    assert found == held(tmp_path, config)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert written(tmp_path, config) == held(tmp_path, config) == found | {"add_bos_token": False}


def held(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """The same, as reading back wants them."""
    wanted = gguf_vocabulary.keys(cast(QuantizedCheckpoint, SimpleNamespace(folder=folder, config=config)))
    return {key.removeprefix("tokenizer.ggml."): value.content for key, value in wanted.items()}


def written(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """The tokenizer's keys, as the writer holds them."""
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, folder, config)
    keys = {key: value.value for one in writer.kv_data for key, value in one.items()}
    return {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items() if "tokenizer" in key}


def test_long_contexts_reach_llama_cpp_as_rope_factors(quantized: QuantizedCheckpoint):
    config = replace(quantized.config, rope_scaling=RopeScaling("ntkmixed", 16.0, 0.3))
    plain = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    got = plain / rope_factors(config).double()  # what llama.cpp computes
    assert torch.allclose(got.float(), inverse_frequencies(config), rtol=1e-6)


@given(rows=st.integers(1, 4), blocks=st.integers(1, 4), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_blocks_mean_to_gguf_what_the_weight_is(rows: int, blocks: int, bits: int, seed: int):
    weight = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    quantized = choose_grid(weight, bits, 32, True).nearest(weight)
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    found = gguf.quants.dequantize(pack(quantized, "w"), kind)
    assert np.array_equal(found, quantized.dequantize().numpy())


def test_what_gguf_cannot_hold_is_refused(tmp_path):
    asymmetric = rounded(tmp_path / "q", blocks=1, symmetric=False)
    with pytest.raises(TargetError, match="zero points"):
        gguf_file.export(asymmetric, tmp_path / "a", context=16)
    assert not (tmp_path / "a").exists()


def test_a_damaged_file_is_bad_input(artifact: Artifact, tmp_path):
    path, good = tmp_path / "model.gguf", artifact.path("model").read_bytes()
    endless = (1 << 40).to_bytes(8, "little")
    first = len(b"general.architecture") + 32  # magic, version, two counts, the first key with its length
    array = good[:first] + (9).to_bytes(4, "little") + (4).to_bytes(4, "little") + endless  # uint32s without end
    for data, told in (
        (b"GGUX" + good[4:], "magic"),
        (array, "too early"),
        (good[:8] + endless + good[16:], "not a GGUF file"),
        (good.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_op.weight"), "has no blk.0.ffn_up.weight"),
        (good[: len(good) // 2], "not a GGUF file"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=told):
            GgufWeights(path, artifact.model)
