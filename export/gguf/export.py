"""GGUF, the format of llama.cpp: Q4_0 and Q8_0 blocks of 32 hold our codes and scales as they are.

    codes [out, in], scales [out, groups]  ->  blocks of 32 columns: float16 scale, then the codes
    Q4_0: w = (q - 8) * d, q of columns j and j + 16 share a byte      Q8_0: w = q * d, q signed

A scale that serves more than 32 columns is repeated. llama.cpp turns neighbouring dimensions together
where BlueLM turns halves, so the rows of q and k are put in that order (whole rows: no code changes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from bluelm.rope import inverse_frequencies
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import complete_weights
from export.gguf.names import NAMES, architecture, has_factors
from export.gguf.tokenizer import add_tokenizer

MODEL = "model.gguf"
BLOCK = 32
STILL = 1e30  # the rope factor of a pair that does not turn: its angle is below any float32
Q4, Q8, F32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    about: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`: model.gguf, which holds the tokenizer too.

    Args:
        about: what the file says of the model: `name`, `license`, `version`, where they are known.

    Raises:
        TargetError: GGUF has no block type that holds a weight exactly; says which.
    """
    with atomic_folder(folder) as temporary:
        write(quantized, temporary / MODEL, context=context, about=about, progress=progress)
        complete_weights(temporary, "gguf", quantized, {MODEL: "model"}, context, "gguf", about)
    return Artifact.open(folder)


def write(
    quantized: QuantizedCheckpoint,
    path: Path,
    *,
    context: int,
    about: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the file `path`, one weight in memory at a time."""
    config = quantized.config
    writer = gguf.GGUFWriter(path, architecture(config))
    for key, text in (about or {}).items():
        writer.add_string(f"general.{key}", text)
    writer.add_file_type(file_type(quantized))
    add_model(writer, config, context)
    add_tokenizer(writer, quantized.folder, config)
    listed = list(tensors(config))
    with (progress or Silent()).task("write GGUF", len(listed)) as task:
        for name, source in listed:
            shape, kind = _layout(quantized, source)
            size = int(np.prod(shape)) * 4 if kind is F32 else _block_bytes(shape, kind)
            dtype = np.dtype(np.float32) if kind is F32 else np.dtype(np.uint8)
            stored = shape if kind is F32 else (shape[0], size // shape[0])
            writer.add_tensor_info(name, stored, dtype, size, raw_dtype=None if kind is F32 else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, source in listed:
            writer.write_tensor_data(_content(quantized, source))
            task.advance(note=name)
    writer.close()


def add_model(writer: gguf.GGUFWriter, config: ModelConfig, context: int) -> None:
    """The model's shape, as llama.cpp's keys."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def file_type(quantized: QuantizedCheckpoint) -> int:
    """What apps show of the file: the type of most of its blocks' numbers."""
    sizes = {4: 0, 8: 0}
    for name, info in quantized.linears.items():
        sizes[info.bits] += int(np.prod(info.shape)) if name.startswith("model.layers.") else 0
    kind = gguf.LlamaFileType.MOSTLY_Q4_0 if sizes[4] >= sizes[8] else gguf.LlamaFileType.MOSTLY_Q8_0
    return int(kind)


def check_weight(weight: QuantizedTensor, name: str) -> None:
    """TargetError unless Q4_0 or Q8_0 blocks hold this weight exactly: symmetric, groups of a multiple of 32, or rows
    of such length, scales that are float16s."""
    problem = fix = ""
    if not weight.symmetric:
        problem, fix = "GGUF's Q4_0 and Q8_0 have no zero points", "use a symmetric recipe"
    elif weight.shape[1] % BLOCK:
        problem, fix = f"GGUF's blocks have 32 columns, the rows {weight.shape[1]}", "use --runtime litert"
    elif weight.columns_per_group % BLOCK:
        problem = f"GGUF's blocks have 32 columns, the groups {weight.columns_per_group}"
        fix = "use --group-size 32, 64 or 128"
    elif weight.scales.dtype != torch.float16:
        problem = "GGUF's blocks have float16 scales, and these have more digits"
        fix = "use --runtime onnx-cpu, or quantize the float checkpoint here"
    if problem:
        raise TargetError(problem, where=name, fix=fix)


def pack(weight: QuantizedTensor, name: str) -> np.ndarray:
    """uint8 [out, bytes a row]: Q4_0 or Q8_0 blocks.

    Raises:
        TargetError: as `check_weight`.
    """
    check_weight(weight, name)
    rows, columns = weight.shape
    blocks = columns // BLOCK
    scales = weight.scales.numpy().repeat(weight.columns_per_group // BLOCK, axis=1)  # [out, blocks]
    head = np.ascontiguousarray(scales).view(np.uint8).reshape(rows, blocks, 2)
    if weight.bits == 8:
        body = weight.signed_codes().numpy().view(np.uint8).reshape(rows, blocks, BLOCK)
    else:
        codes = weight.codes.numpy().reshape(rows, blocks, BLOCK)
        body = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return np.concatenate([head, body], axis=-1).reshape(rows, -1)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, ...] of q or k from half-split to neighbouring pairs: 0, d/2, 1, d/2 + 1, ..."""
    split = rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)


def rope_factors(config: ModelConfig) -> Tensor:
    """float32 [head_dim / 2]: what llama.cpp divides the plain frequencies by; `STILL` for what does not turn."""
    factors = plain_frequencies(config.rope_theta, config.head_dim) / inverse_frequencies(config).double()
    return factors.float().clamp(max=STILL)


def plain_frequencies(theta: float, size: int) -> Tensor:
    """theta**(-2j/d), float64 [d/2]."""
    return theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def reordered_heads(config: ModelConfig, source: str) -> int | None:
    """Heads of a tensor of q or k whose rows are interleaved in the file; None for any other tensor.

    `source`: its name in the checkpoint, or in a block.
    """
    if architecture(config) != "llama":
        return None
    return block_of(config).turned.get(in_block(source.removesuffix(".bias")))


def in_block(source: str) -> str:
    """A tensor's name in its block."""
    return source.split(".", 3)[-1] if source.startswith("model.layers.") else source


def in_file_order(config: ModelConfig, source: str, rows: Tensor) -> Tensor:
    """Rows [out, ...] of a weight, or a bias [out], of the checkpoint's name `source`, as they lie in the file."""
    heads = reordered_heads(config, source)
    return rows if heads is None else interleaved(rows, heads)


def tensors(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(name in the file, name in the checkpoint) of every tensor, in the file's order."""
    block = block_of(config)
    yield "token_embd.weight", "model.embed_tokens"
    if has_factors(config):
        yield "rope_freqs.weight", "rope"
    for layer in range(config.num_layers):
        for local in (*block.linears, *block.norms):
            yield f"blk.{layer}.{NAMES[local]}.weight", f"model.layers.{layer}.{local}"
            if local in block.linears and block.linears[local].biased:
                yield f"blk.{layer}.{NAMES[local]}.bias", f"model.layers.{layer}.{local}.bias"
    yield "output_norm.weight", "model.norm"
    yield "output.weight", "lm_head"


def is_linear(config: ModelConfig, source: str) -> bool:
    """Whether a tensor is quantized."""
    return in_block(source) in block_of(config).linears or source in ("lm_head", "model.embed_tokens")


def _linear(quantized: QuantizedCheckpoint, source: str) -> QuantizedTensor:
    weight = quantized.linear(source)
    return weight.with_rows(lambda part: in_file_order(quantized.config, source, part))


def _content(quantized: QuantizedCheckpoint, source: str) -> np.ndarray:
    if is_linear(quantized.config, source):
        return pack(_linear(quantized, source), source)
    if source == "rope":
        return rope_factors(quantized.config).numpy()
    return np.ascontiguousarray(in_file_order(quantized.config, source, quantized.vector(source)).numpy())


def _layout(quantized: QuantizedCheckpoint, source: str) -> tuple[tuple[int, ...], gguf.GGMLQuantizationType]:
    """Shape and type of a tensor before its bytes are made."""
    if is_linear(quantized.config, source):
        weight = _linear(quantized, source)
        check_weight(weight, source)
        return weight.shape, Q8 if weight.bits == 8 else Q4
    vector = rope_factors(quantized.config) if source == "rope" else quantized.vector(source)
    return tuple(vector.shape), F32


def _block_bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size
