"""The decoder in plain float32 torch, one for every architecture.

B batch, T new tokens, S tokens in all (cached + new), H heads, K key-value heads, D head_dim. The embedding
LayerNorm of BlueLM is folded into the table before it comes here, so both architectures are one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bluelm.config import ModelConfig
from bluelm.rope import inverse_frequencies, rope_rows
from bluelm.weights import Weights


class KVCache:
    """Keys and values of the tokens seen so far, float32 [layers, 2, B, K, capacity, D].

    With dynamic rope the frequencies are those of a context of `capacity` tokens from the first token on,
    as in an artifact compiled for that context.
    """

    def __init__(self, config: ModelConfig, capacity: int, batch: int = 1) -> None:
        self.capacity = capacity
        self.first = 0  # slots before it are empty, and nothing sees them
        self.length = 0  # slots up to the newest token; the decoder advances it when all layers are done
        self._store = torch.zeros(config.num_layers, 2, batch, config.num_kv_heads, capacity, config.head_dim)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, K, T, D] behind `length` slots; returns all that are filled, [B, K, S, D] each."""
        stop = self.length + keys.shape[2]
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {stop} are needed")
        store = self._store[layer]
        store[0, :, :, self.length : stop] = keys
        store[1, :, :, self.length : stop] = values
        return store[0, :, :, self.first : stop], store[1, :, :, self.first : stop]

    def reset(self) -> None:
        """Forget everything."""
        self.seek(0)

    def seek(self, position: int) -> None:
        """Forget everything; the next token stands at `position`."""
        self.first = self.length = position


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, config: ModelConfig, size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size or config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, D] with cos, sin [T, D]: pairs (j, j + D/2) turn by their angle."""
    first, second = x.chunk(2, dim=-1)  # [B, H, T, D/2] each
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with K <= H key-value heads; each serves H / K query heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)
        if config.qk_norm:  # one for all heads of q, one for all of k
            self.q_norm, self.k_norm = RMSNorm(config, config.head_dim), RMSNorm(config, config.head_dim)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        return self.o_proj(self.mix(x, cos, sin, cache, layer))  # [B, T, hidden]

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """What o_proj reads: the heads' mixed values side by side, [B, T, H * D]."""
        batch, new, _ = x.shape  # [B, T, hidden]
        queries = self.q_proj(x).view(batch, new, -1, self.head_dim).transpose(1, 2)  # [B, H, T, D]
        keys = self.k_proj(x).view(batch, new, -1, self.head_dim).transpose(1, 2)  # [B, K, T, D]
        values = self.v_proj(x).view(batch, new, -1, self.head_dim).transpose(1, 2)  # [B, K, T, D]
        if self.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        if cache is not None:
            keys, values = cache.extend(layer, keys, values)  # [B, K, S, D]
        seen = keys.shape[2]
        # new token t sees the cached tokens and new ones up to itself: a lower triangle shifted by S - T
        mask = None if new in (1, seen) else torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=new == seen > 1, enable_gqa=True
        )  # [B, H, T, D]
        return mixed.transpose(1, 2).reshape(batch, new, -1)  # [B, T, H * D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(x))  # [B, T, hidden]

    def gated(self, x: Tensor) -> Tensor:
        """What down_proj reads, [B, T, intermediate]."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class DecoderBlock(nn.Module):
    """One layer: attention, then MLP, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    @staticmethod
    def from_weights(config: ModelConfig, tensors: Mapping[str, Tensor]) -> DecoderBlock:
        """A block around `tensors` (as `Weights.block` gives them, not copied), without gradients."""
        with torch.device("meta"):
            block = DecoderBlock(config)
        block.load_state_dict(tensors, assign=True)
        return block.requires_grad_(False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x [B, T, hidden], cos and sin [T, D] of the new positions -> [B, T, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token embedding, blocks, last norm, head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)  # drawn on the meta device, it imports torch._dynamo
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @staticmethod
    def from_weights(weights: Weights) -> Decoder:
        """The whole model in memory as float32, without gradients; larger ones go block by block."""
        config = weights.config
        with torch.device("meta"):
            decoder = Decoder(config)
        embedding = weights.embedding()
        state = {
            "embed.weight": embedding,
            "norm.weight": weights.final_norm(),
            "head.weight": embedding if config.shares_table else weights.head(),
        }
        for index in range(config.num_layers):
            state |= {f"blocks.{index}.{name}": tensor for name, tensor in weights.block(index).items()}
        decoder.load_state_dict(state, assign=True)
        return decoder.requires_grad_(False)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens int64 [B, T] -> logits float32 [B, T, vocab]; with a cache they continue what it holds."""
        start = cache.length if cache is not None else 0
        stop = start + tokens.shape[1]
        frequencies = inverse_frequencies(self.config, cache.capacity if cache is not None else stop)
        cos, sin = rope_rows(frequencies, start, stop)  # [T, D]
        x = self.embed(tokens)  # [B, T, hidden]
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache, layer)
        if cache is not None:
            cache.length = stop
        return self.head(self.norm(x))  # [B, T, vocab]
