"""llama.cpp's names: of the architecture that computes a model, and of a block's tensors."""

from __future__ import annotations

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import TargetError

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
"""llama.cpp's name of each tensor of a block."""


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture: qwen2 is its Llama with biases, and turns halves.

    Its qwen2 takes no rope factors, and its llama takes biases too: what needs both, as ChatGLM does, is a llama.
    Queries and keys are normalised by its qwen3 alone, which turns halves and takes no rope factors either.

    Raises:
        TargetError: none computes this model.
    """
    block = block_of(config)
    unnamed = (block.linears.keys() | block.norms.keys()) - NAMES.keys()
    if unnamed:
        raise TargetError(f"llama.cpp has no {', '.join(sorted(unnamed))}", fix="use --runtime onnx-cpu")
    if config.qk_norm:
        if config.qkv_bias or has_factors(config):
            what = "biases of q, k and v" if config.qkv_bias else "a scaled rope"
            raise TargetError(f"llama.cpp's qwen3 has no {what}", fix="use --runtime onnx-cpu")
        return "qwen3"
    return "qwen2" if config.qkv_bias and not has_factors(config) else "llama"


def has_factors(config: ModelConfig) -> bool:
    """Whether the rope is another than theta**(-2j/d) over the whole head."""
    return config.rope_scaling is not None or config.rotary_dim < config.head_dim
