"""The table of architectures: how each differs from a plain Llama, as names and switches.

A row says what the fields of config.json and the tensors are called, and which of a few differences apply. On reading,
all become one decoder: fused tensors are split, a normalised head is normalised once, rotary pairs that are neighbours
are moved half a head apart, and dimensions of a head that do not rotate get the frequency 0. Only biases of q, k and v,
and norms of q and k, remain for runtimes to know about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Q, K, V = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE, UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: config.json's.
        fields: name here -> name in this architecture's config.json.
        must: required fields, each with the message shown when it is missing.
        needs: fields that must have this value, or be absent; another value is a model that is not supported.
        also: other names in `architectures` for the same.
        names: name in a Llama checkpoint -> name in this one; the longest fitting beginning counts.
        fused: tensor -> the tensors whose rows lie in it one after another.
        qkv_bias: linears of q, k and v have biases; "field" for config.json's `add_qkv_bias`.
        qk_norm: each head of q and of k passes an RMSNorm before it is turned.
        rotary: pairs of dimensions that turn together: half a head apart, or neighbours.
        rotary_factor: share of each head that turns.
        rope_ratio: the field `rope_ratio` changes the rope; what it means depends on the model's generation.
        normalised_head: each row of the head is divided by its length.
        foreign_rows: vocabulary sizes that belong to other architectures, each with the message shown for it.
        embedding_layer_norm: the field `use_stable_embedding` may add a LayerNorm behind the embedding.
    """

    model_type: str
    fields: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    must: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    needs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    also: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    qkv_bias: bool | Literal["field"] = False
    qk_norm: bool = False
    rotary: Literal["half-split", "interleaved"] = "half-split"
    rotary_factor: float = 1.0
    rope_ratio: bool = False
    normalised_head: bool = False
    foreign_rows: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    embedding_layer_norm: bool = False


BAICHUAN_ROPE = {"max_position_embeddings": "this is a 13B, whose ALiBi is not supported; the 7B has rope"}
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    "BlueLMForCausalLM": Architecture("BlueLM", embedding_layer_norm=True),
    "LlamaForCausalLM": Architecture("llama"),
    "Qwen2ForCausalLM": Architecture("qwen2", qkv_bias=True, needs={"use_sliding_window": False}),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        qk_norm=True,
        must={"head_dim": "transformers makes heads of 128 then, whatever hidden_size is"},
        needs={"use_sliding_window": False},
    ),
    # Baichuan 2, whose head is normalised whatever rows a fine-tune added, and Baichuan 1 with its plain head.
    "BaichuanForCausalLM": Architecture(
        "baichuan",
        must=BAICHUAN_ROPE,
        fused={"self_attn.W_pack": (Q, K, V)},
        normalised_head=True,
        foreign_rows={64000: "Baichuan 1's, whose head is plain: its architecture is BaiChuanForCausalLM"},
    ),
    "BaiChuanForCausalLM": Architecture(
        "baichuan",
        must=BAICHUAN_ROPE,
        fused={"self_attn.W_pack": (Q, K, V)},
        foreign_rows={125696: "Baichuan 2's, whose head is normalised: its architecture is BaichuanForCausalLM"},
    ),
    # ChatGLM2 and ChatGLM3
    "ChatGLMModel": Architecture(
        "chatglm",
        also=("ChatGLMForConditionalGeneration",),
        fields={
            "vocab_size": "padded_vocab_size",
            "intermediate_size": "ffn_hidden_size",
            "num_hidden_layers": "num_layers",
            "num_key_value_heads": "multi_query_group_num",
            "head_dim": "kv_channels",
            "rms_norm_eps": "layernorm_epsilon",
            "max_position_embeddings": "seq_length",
        },
        needs={
            "rmsnorm": True,
            "post_layer_norm": True,
            "add_bias_linear": False,
            "multi_query_attention": True,
            "original_rope": True,
            "apply_residual_connection_post_layernorm": False,
        },
        names={
            "model.embed_tokens": "transformer.embedding.word_embeddings",
            "model.layers.": "transformer.encoder.layers.",
            "model.norm": "transformer.encoder.final_layernorm",
            "lm_head": "transformer.output_layer",
            "self_attn.": "self_attention.",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        fused={
            "self_attention.query_key_value": (Q, K, V),
            "mlp.dense_h_to_4h": (GATE, UP),
        },
        qkv_bias="field",
        rotary="interleaved",
        rotary_factor=0.5,
        rope_ratio=True,
    ),
})  # fmt: skip


def find(name: object) -> tuple[str, Architecture] | None:
    """The row that `name` stands for in `architectures`, with its first name; None where there is none."""
    for first, row in ARCHITECTURES.items():
        if name == first or name in row.also:
            return first, row
    return None
