"""Writing a quantized checkpoint as a Hugging Face folder that other tools load: GPTQ, AWQ, compressed-tensors.

Linears of the blocks hold our codes, scales and zero points as they are. Embedding, norms and head are float16, as
such checkpoints have them; the embedding LayerNorm is folded in, so that a BlueLM is a plain Llama there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bluelm.block import block_of
from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.system.files import atomic_folder, write_text
from bluelm.system.progress import Progress, Silent
from compress.checkpoint.pieces import LinearInfo
from compress.checkpoint.quantized import OrderedWeight
from compress.checkpoint.store import QuantizedCheckpoint
from compress.formats.awq import describe_awq, pack_awq
from compress.formats.compressed import describe_compressed, pack_compressed
from compress.formats.gptq import describe_gptq, pack_gptq
from compress.formats.plain import plain_config, write_tokenizer
from compress.formats.shards import Shards
from compress.methods.gptq import GptqOptions
from compress.methods.rotate import as_quantized
from compress.recipe import Recipe

Kind = Literal["gptq", "awq", "compressed-tensors"]
KINDS: tuple[str, ...] = get_args(Kind)
WORD = 32  # bits


def check_recipe(config: ModelConfig, recipe: Recipe, kind: Kind) -> None:
    """Make sure, before any work, that a format can hold what the recipe makes of the blocks' linears.

    Raises:
        InputError: it cannot; says why.
    """
    plain_config(config)
    if kind == "awq" and (recipe.auto or recipe.layers):
        raise InputError("AWQ has one width for all linears", fix="use --format gptq or compressed-tensors")
    if recipe.size is not None:
        fix = "give --max-kl, or neither: then the blocks are as large as the recipe's own widths make them"
        raise InputError(f"{kind} keeps embedding and head in float16, so that --size cannot be held", fix=fix)
    for index in range(config.num_layers):
        for name, linear in block_of(config).linears.items():
            full = f"model.layers.{index}.{name}"
            widths = recipe.widths(full)
            info = LinearInfo((linear.rows, linear.columns), widths.bits, widths.group_size, widths.symmetric)
            check_linear(full, info, kind)


def check_linear(name: str, info: LinearInfo, kind: Kind) -> None:
    """InputError unless the format holds a linear of this width and shape."""
    widths = (4,) if kind == "awq" else (4, 8)
    if info.bits not in widths:
        fix = f"choose {' or '.join(map(str, widths))} bits"
        raise InputError(f"the format {kind} has no {info.bits}-bit codes", where=name, fix=fix)
    if info.ordered and kind != "gptq":
        fix = "use --format gptq"
        raise InputError(f"{kind} cannot hold the scattered groups of act-order", where=name, fix=fix)
    rows, columns = info.shape
    packed = {"gptq": (rows, columns), "awq": (rows,), "compressed-tensors": (columns,)}[kind]
    if kind == "compressed-tensors" and not info.symmetric:
        packed += (rows,)
    for size in packed:
        if size * info.bits % WORD:
            fix = "use another format, or 8 bits"
            raise InputError(f"{size} codes of {info.bits} bits fill no whole 32-bit words", where=name, fix=fix)


def write(
    quantized: QuantizedCheckpoint,
    checkpoint: Checkpoint,
    out: Path,
    kind: Kind,
    progress: Progress | None = None,
    *,
    tokenizer: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder `out`.

    Args:
        checkpoint: what `quantized` was made of; embedding and head come from it in float.
        tokenizer: writes its files into the folder. Default: those of `quantized`, as transformers reads them.

    Raises:
        InputError: `out` is there already, or the format cannot hold a weight.
    """
    check_out(out)
    infos = {name: info for name, info in quantized.linears.items() if name.startswith("model.layers.")}
    for name, info in infos.items():
        check_linear(name, info, kind)
    if kind == "awq" and len({(info.bits, info.group_size) for info in infos.values()}) > 1:
        raise InputError("AWQ has one group size for all linears", where=quantized.folder, fix="use --format gptq")
    block, blocks = block_of(quantized.config), range(quantized.config.num_layers)
    # version 1 has no place for a zero point of 0, and GPTQModel loads no asymmetric one but its own
    version = 1 if all(info.symmetric for info in infos.values()) else 2
    with atomic_folder(out) as folder, (progress or Silent()).task(f"write {kind}", len(blocks) + 1) as task:
        shards = Shards(folder)
        for name, tensor in _ends(quantized, checkpoint):
            shards.add({name: _half(tensor, name)})
        task.advance(note="embedding and head")
        for index in blocks:
            prefix = f"model.layers.{index}."
            for local in block.linears:
                stem = f"{prefix}{local}"
                parts = _pack(quantized.ordered(stem), kind, version)
                shards.add({f"{stem}.{part}": tensor for part, tensor in parts.items()})
            for name, shape in block.shapes.items():
                if len(shape) == 1:
                    shards.add({f"{prefix}{name}": _half(quantized.vector(f"{prefix}{name}"), f"{prefix}{name}")})
            task.advance(note=f"block {index}")
        shards.finish()
        settings = _settings(quantized, infos, kind, version)
        config = plain_config(quantized.config) | {"quantization_config": settings}
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        if kind == "gptq":  # AutoGPTQ and GPTQModel look here first
            write_text(folder / "quantize_config.json", json.dumps(settings, indent=2) + "\n")
        if tokenizer is None:
            write_tokenizer(quantized.folder, folder, quantized.config)
        else:
            tokenizer(folder)


def who_cannot_load(quantized: QuantizedCheckpoint, kind: Kind) -> str | None:
    """What to say of a folder with linears of several widths; None where all have one."""
    width = {name: (info.bits, info.group_size) for name, info in quantized.linears.items() if ".layers." in name}
    if len(set(width.values())) == 1:
        return None
    single = "" if kind == "compressed-tensors" else "transformers reads one width alone (GPTQModel reads all); "
    for index in range(quantized.config.num_layers):
        for stage in block_of(quantized.config).stages:
            names = [f"model.layers.{index}.{linear}" for linear in stage.linears]
            if len({width[name] for name in names}) > 1:
                fused = ", ".join(linear.rpartition(".")[2] for linear in stage.linears)
                return f"widths differ: {single}vLLM fuses {fused}, which differ in block {index}"
    return f"widths differ: {single.rstrip('; ')}" if single else None


def check_out(out: Path) -> None:
    """InputError if something is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("the output exists", where=out, fix="name another output folder, or remove it")


def _pack(ordered: OrderedWeight, kind: Kind, version: int) -> dict[str, Tensor]:
    if kind == "gptq":
        return pack_gptq(ordered, version)
    return pack_awq(ordered.weight) if kind == "awq" else pack_compressed(ordered.weight)


def _settings(
    quantized: QuantizedCheckpoint, infos: Mapping[str, LinearInfo], kind: Kind, version: int
) -> dict[str, Any]:
    """The quantization_config."""
    if kind == "gptq":
        return describe_gptq(infos, version, quantized.recipe.options_of(GptqOptions).damping)
    return describe_awq(infos) if kind == "awq" else describe_compressed(infos)


def _ends(quantized: QuantizedCheckpoint, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Embedding, last norm and head in float, turned if the recipe turns the hidden states."""
    tables = as_quantized(checkpoint, quantized.recipe)
    yield "model.embed_tokens.weight", tables.embedding()
    yield "model.norm.weight", quantized.final_norm()
    if not quantized.config.shares_table:
        yield "lm_head.weight", tables.head()


def _half(tensor: Tensor, name: str) -> Tensor:
    half = tensor.half()
    if not torch.isfinite(half).all():
        fix = "the model cannot be held in this format"
        raise InputError(f"{name} has values beyond float16", where=name, fix=fix)
    return half
