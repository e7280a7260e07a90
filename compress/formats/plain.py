"""config.json and tokenizer of a folder that transformers reads by itself: no code of the model's own needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bluelm.config import NTKMIXED_POWER, ModelConfig
from bluelm.errors import InputError
from bluelm.rope import inverse_frequencies, max_context
from bluelm.system.files import write_text
from bluelm.text.added_tokens import optional_json
from bluelm.text.sentencepieces import has_dummy_prefix
from bluelm.text.tokenizer import Tokenizer, copy_own


def plain_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the Llama (with biases of q, k and v the Qwen2, with norms of q and k the Qwen3) that computes
    what the decoder does.

    Raises:
        InputError: neither does.
    """
    if config.rotary_dim != config.head_dim:
        fix = "other formats than bluelm-export's own need a model that turns whole heads"
        raise InputError(f"no Llama turns {config.rotary_dim} of {config.head_dim} dimensions of a head", fix=fix)
    kind, architecture = ("qwen2", "Qwen2ForCausalLM") if config.qkv_bias else ("llama", "LlamaForCausalLM")
    if config.qk_norm:
        kind, architecture = "qwen3", "Qwen3ForCausalLM"
    values = config.to_dict()
    for name in ("use_stable_embedding", "add_qkv_bias"):
        values.pop(name, None)
    return values | {
        "architectures": [architecture],
        "model_type": kind,
        "tie_word_embeddings": config.shares_table,
        "max_position_embeddings": max_context(config),
        "rope_scaling": _rope_scaling(config),
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
    }


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    """Rope scaling as transformers knows it; ntkmixed as `longrope`, which takes a factor for each frequency."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "ntkmixed":
        found: dict[str, Any] | None = config.to_dict()["rope_scaling"]
        if found and "type" in found:
            found["rope_type"] = found.pop("type")
        return found
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    plain = config.rope_theta ** (-pairs / config.head_dim)
    factors = (plain / inverse_frequencies(config).double()).tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": scaling.factor,
        "attention_factor": 1.0,  # ntkmixed scales no attention
        NTKMIXED_POWER: scaling.power,  # by which we know it again
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def write_tokenizer(source: Path, folder: Path, config: ModelConfig) -> None:
    """The tokenizer's files, its class replaced by one that transformers has, and generation_config.json."""
    copy_own(source, folder)
    settings = optional_json(folder, "tokenizer_config.json")
    settings.pop("auto_map", None)
    if (folder / "tokenizer.model").exists() and Tokenizer.from_folder(source).source.name == "tokenizer.model":
        settings = {"add_bos_token": True, "add_eos_token": False, **settings}
        settings |= {
            "tokenizer_class": "LlamaTokenizer",
            "add_prefix_space": has_dummy_prefix(folder / "tokenizer.model"),
        }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    ends = list(config.eos_token_ids)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config.pad_token_id,
    }
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
