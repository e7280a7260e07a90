"""Writes the artifact: quantized graphs whose cache slides inside them, the stage in front, genai_config.json.

    front.onnx -> prefill_1.onnx | decode_1.onnx -> ... -> the head's prefill and decode -> logits

The folder is one that onnxruntime-genai opens as it is, on a CPU; what is compiled of it runs on the NPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import write_embedding
from export.artifacts.mobile import EMBEDDING
from export.artifacts.package import complete
from export.lowering.parts import Part, split, whole
from export.lowering.ranges import Ranges
from export.npu_genai.border import SLIDING
from export.npu_genai.config import CONFIG, FRONT, padding, pipeline_config
from export.npu_genai.front import front
from export.onnx import npu
from export.onnx.decoder import write_graphs
from export.tokenizer.genai import write_tokenizer

FORMAT = "onnx-npu-genai"


def export(
    quantized: QuantizedCheckpoint,
    ranges: Ranges,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    part_bytes: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`.

    Args:
        part_bytes: as in `export/onnx/npu.py`.

    Raises:
        InputError: `ranges` are another checkpoint's, or the chunk does not divide the context.
        TargetError: a weight has zero points, the embedding groups, a block or the head is larger than `part_bytes`,
            or the vocabulary has no token to fill prompts up with.
    """
    check_window(context, chunk)
    ranges.check(quantized)
    config, parts = quantized.config, parts_of(quantized, part_bytes)
    backend = npu.backend(quantized, ranges)
    with atomic_folder(folder) as temporary:
        write_graphs(
            temporary, config, context, chunk, ranges.mask_value, backend, progress or Silent(), parts, SLIDING
        )
        ranges.save(temporary / "ranges.json")
        write_embedding(temporary / EMBEDDING, quantized.embed())
        stage = front(quantized.embed(), temporary / EMBEDDING, context, ranges.mask_value)
        (temporary / FRONT).write_bytes(stage.SerializeToString(deterministic=True))
        told = pipeline_config(config, parts, context, chunk, padding(tokenizer_of(quantized), config))
        (temporary / CONFIG).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        roles = {FRONT: "front", CONFIG: "genai", **write_tokenizer(temporary, quantized.folder, context)}
        cache = "int16" if ranges.cache_bits == 16 else "int8"
        complete(temporary, FORMAT, quantized, context, chunk, ranges.mask_value, len(parts), cache, roles)
    return Artifact.open(folder)


def tokenizer_of(quantized: QuantizedCheckpoint) -> Tokenizer | None:
    """The checkpoint's, if it has one."""
    there = any((quantized.folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    return Tokenizer.from_folder(quantized.folder) if there else None


def check_window(context: int, chunk: int) -> None:
    """Genai fills a prompt up to whole chunks, which have to fit the context, and takes a chunk of one for none.

    Raises:
        InputError: they do not.
    """
    if chunk < 2 or chunk == context or context % chunk:
        raise InputError(
            f"a context of {context} tokens is not two or more chunks of {chunk} tokens, as onnxruntime-genai needs",
            fix="choose a --chunk of at least 2 that divides the --context",
        )


def parts_of(quantized: QuantizedCheckpoint, part_bytes: int | None) -> list[Part]:
    """Those that the sizes ask for, and the head by itself, which runs once a prompt."""
    parts = [whole(quantized.config.num_layers)]
    if part_bytes is not None:
        parts = split(0, *npu.weight_sizes(quantized), part_bytes)
    return head_apart(parts, quantized.config)


def head_apart(parts: Sequence[Part], config: ModelConfig) -> list[Part]:
    """The same parts, the last of which is the head alone."""
    *rest, last = parts
    if not last.layers:
        return list(parts)
    return [*rest, replace(last, heads=False), Part(False, config.num_layers, config.num_layers, True)]
