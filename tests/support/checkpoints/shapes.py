"""Small float checkpoints: random ones in every shape that a real one can have, and the first blocks of a real one."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from bluelm.checkpoint import Checkpoint, model_shapes
from bluelm.config import ModelConfig
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import TOKENIZER_FILES

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")
MARKS = ["[|Human|]:", "[|AI|]:"]
TINY: dict[str, Any] = {"hidden": 64, "inner": 128, "layers": 2, "heads": 2, "kv_heads": 1, "vocab": 6144}


def config_dict(
    *,
    architecture: str = "BlueLMForCausalLM",
    layers: int = 2,
    hidden: int = 64,
    inner: int = 96,
    heads: int = 4,
    kv_heads: int | None = 2,
    vocab: int = 512,
    layer_norm: bool = True,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A config.json; `more` adds or replaces fields by their own names."""
    return {
        "architectures": [architecture],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "use_stable_embedding": layer_norm,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    } | more


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """float32 tensors that keep activations near 1: norms around 1, the others scaled by the width."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in model_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            tensors[name] = noise * shape[1] ** -0.5
        else:
            tensors[name] = 0.2 * noise + (0 if name.endswith("bias") else 1)
    return tensors


def write_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    file_format: Literal["safetensors", "bin"] = "safetensors",
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **shape: Any,
) -> Path:
    """Write a random checkpoint into `folder` (made if need be) and return it.

    Args:
        shards: files to spread the tensors over; more than one come with an index.
        tokenizer: also a tokenizer.model with at most `vocab` pieces; the demo's where it fits.
        shape: as for `config_dict`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = config_dict(**shape)
    (folder / "config.json").write_text(json.dumps(data))
    config = ModelConfig.from_dict(data)
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config, seed).items()}
    write_tensors(folder, tensors, shards=shards, file_format=file_format)
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(small_tokenizer(config.vocab_size))
    return folder


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write a BlueLM that goes the whole way in seconds, with the demo's tokenizer."""
    return write_checkpoint(folder, seed=seed, max_position_embeddings=2048, torch_dtype="float32", **TINY)


def shortened(source: Path, layers: int, folder: Path) -> Path:
    """Write the first `layers` blocks of a checkpoint, in bfloat16."""
    checkpoint = Checkpoint.open(source)
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    gone = tuple(f"model.layers.{index}." for index in range(layers, checkpoint.config.num_layers))
    kept = {name: checkpoint.tensor(name) for name in checkpoint.tensors if not name.startswith(gone or "-")}
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in kept.items()}, folder / "model.safetensors")
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    return folder


def write_tensors(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    shards: int = 1,
    file_format: Literal["safetensors", "bin"] = "safetensors",
) -> None:
    """Tensors round-robin into `shards` files of one of the two formats, with an index for several."""
    stem = "model" if file_format == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        tail = f"-{number + 1:05}-of-{shards:05}" if shards > 1 else ""
        file = f"{stem}{tail}.{file_format}"
        save_file(part, folder / file) if file_format == "safetensors" else torch.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    if shards > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{stem}.{file_format}.index.json").write_text(text)


@cache
def small_tokenizer(size: int) -> bytes:
    """A tokenizer.model of at most `size` pieces: the demo's, or one trained on its model card."""
    demo = (demo_checkpoint() / "tokenizer.model").read_bytes()
    if size >= 6144:
        return demo
    return train_tokenizer(vocab_size=size, add_dummy_prefix=False, user_defined_symbols=MARKS)


def train_tokenizer(**options: Any) -> bytes:
    """A BPE tokenizer.model with byte fallback; `options` are sentencepiece's."""
    model = io.BytesIO()
    text = (demo_checkpoint() / "README.md").read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(text),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": 512,
            "byte_fallback": True,
            "character_coverage": 0.98,
            "pad_id": 3,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "hard_vocab_limit": False,
            "num_threads": 1,
            "minloglevel": 2,
        }
        | options,
    )
    return model.getvalue()


DEMO = ModelConfig.from_folder(demo_checkpoint())


SEVEN = replace(
    DEMO,
    vocab_size=100096,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
)
