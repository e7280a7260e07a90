"""The decoder of static shapes that NPUs' delegates take: exported programs give the dequantized model's logits."""

from __future__ import annotations

import numpy as np
import torch

from export.artifacts.embedding import EmbeddingTable, write_embedding
from export.executorch.static import trace
from targets.host.cached_runtime import step_mask
from targets.host.torch_runtime import TorchRuntime
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import tiny_checkpoint

CONTEXT, CHUNK = 16, 4
TOKENS = [1, 400, 23, 871, 5000, 77]


def test_a_chunk_and_two_tokens_agree_with_torch(tmp_path):
    quantized = rounded(tmp_path / "q", source=tiny_checkpoint(tmp_path / "tiny"), blocks=1)
    programs = trace(quantized, context=CONTEXT, chunk=CHUNK)
    write_embedding(tmp_path / "e.safetensors", quantized.embed())
    table, config = EmbeddingTable.open(tmp_path / "e.safetensors"), quantized.config
    keys = torch.zeros(1, config.num_kv_heads, config.head_dim, CONTEXT)
    values = torch.zeros(1, config.num_kv_heads, CONTEXT, config.head_dim)
    rows: list[np.ndarray] = []
    for start, width, name in ((0, CHUNK, "prefill"), (4, 1, "decode"), (5, 1, "decode")):
        hidden = torch.from_numpy(table.rows(TOKENS[start : start + width])[None].astype(np.float32))
        positions = torch.arange(start, start + width, dtype=torch.int32)
        mask = torch.from_numpy(step_mask(start, width, CONTEXT, -10000.0))
        past = keys[..., : CONTEXT - width].clone(), values[:, :, : CONTEXT - width].clone()
        logits, new_keys, new_values = programs[name].module()(hidden, positions, mask, *past)
        keys[..., start : start + width], values[:, :, start : start + width] = new_keys, new_values
        rows.append(logits[0].numpy())
    expected = TorchRuntime(quantized, CONTEXT).logits(TOKENS)
    assert np.allclose(np.concatenate(rows), expected, atol=1e-4)


def test_codes_stay_integers_in_the_program(tmp_path):
    quantized = rounded(tmp_path / "q", source=tiny_checkpoint(tmp_path / "tiny"), blocks=1)
    held = trace(quantized, context=CONTEXT, chunk=CHUNK)["decode"].state_dict
    for name in ("model.layers.0.mlp.up_proj", "lm_head"):
        found = held[f"{name.replace('.', '_')}_codes"]
        assert torch.equal(found, quantized.linear(name).signed_codes())
