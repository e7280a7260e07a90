"""Files beside an artifact whose whole model is one file: tokenizer, config.json,
artifact.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from bluelm.text.tokenizer import copy_files
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact, Cache, Format, list_files
from export.artifacts.embedding import write_embedding
from export.artifacts.package import bits_per_weight, parameter_count

KvBits = Literal[8, 16, 32]
CACHES: Mapping[int, Cache] = {8: "int8", 16: "float16", 32: "float32"}
MODEL, EMBEDDING = "model.pte", "embedding.safetensors"


def complete(
    folder: Path,
    kind: Format,
    quantized: QuantizedCheckpoint,
    roles: Mapping[str, str],
    *,
    context: int,
    chunk: int,
    kv_bits: KvBits,
    producers: Mapping[str, str],
    mask_value: float = 0.0,
    notes: tuple[str, ...] = (),
    about: Mapping[str, str] | None = None,
) -> Artifact:
    """Complete a folder that holds the files of `roles` (path -> role)."""
    named = dict(roles)
    config = json.dumps(quantized.config.to_dict(), indent=1) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    named["config.json"] = "config"
    named |= dict.fromkeys(copy_files(quantized.folder, folder, but=named), "tokenizer")
    files = list_files(folder, named)
    parameters = parameter_count(quantized.config)
    artifact = Artifact(
        format=kind,
        model=quantized.config,
        context=context,
        chunk=chunk,
        mask_value=mask_value,
        cache=CACHES[kv_bits],
        parameters=parameters,
        bits_per_weight=bits_per_weight(files, parameters),
        quantized_digest=quantized.digest(),
        producers={"bluelm-export": version("bluelm-export"), **producers},
        notes=notes,
        about=dict(about or {}),
        files=files,
    )
    artifact.save(folder)
    return artifact


def complete_weights(
    folder: Path,
    kind: Format,
    quantized: QuantizedCheckpoint,
    roles: Mapping[str, str],
    context: int,
    producer: str,
    about: Mapping[str, str] | None,
    *,
    notes: tuple[str, ...] = (),
) -> Artifact:
    """Complete a folder of weights without a graph: its program takes prompts of any length and caches float16.

    Args:
        producer: package that wrote them.
    """
    return complete(
        folder,
        kind,
        quantized,
        roles,
        context=context,
        chunk=context,
        kv_bits=16,
        producers={producer: version(producer)},
        notes=notes,
        about=about,
    )


def complete_steps(
    folder: Path,
    kind: Format,
    quantized: QuantizedCheckpoint,
    *,
    context: int,
    chunk: int,
    mask_value: float,
    producers: Sequence[str],
    notes: tuple[str, ...] = (),
) -> Artifact:
    """Complete a folder that holds MODEL, a program of steps whose host looks embeddings up and keeps a float32 cache.

    Args:
        producers: packages that made it.
    """
    write_embedding(folder / EMBEDDING, quantized.embed())
    return complete(
        folder,
        kind,
        quantized,
        {MODEL: "model", EMBEDDING: "embedding"},
        context=context,
        chunk=chunk,
        kv_bits=32,
        mask_value=mask_value,
        producers={name: version(name) for name in producers},
        notes=notes,
    )
