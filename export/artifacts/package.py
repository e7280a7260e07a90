"""Files that every artifact has beside its graphs: embedding rows, tokenizer, config.json and artifact.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.text.tokenizer import copy_files
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact, ArtifactFile, Cache, Format, list_files
from export.artifacts.embedding import write_embedding
from export.onnx.decoder import GRAPHS, WEIGHTS, part_file

WEIGHT_ROLES = ("weights", "context", "embedding", "model")
"""Of files that hold weights."""


def complete(
    folder: Path,
    kind: Format,
    quantized: QuantizedCheckpoint,
    context: int,
    chunk: int,
    mask_value: float,
    parts: int = 1,
    cache: Cache = "float32",
    more: Mapping[str, str] | None = None,
) -> Artifact:
    """Complete a folder that holds the graphs and weights of an ONNX artifact.

    Args:
        more: path -> role of other files that it holds already.
    """
    roles = dict(more or {})
    for index in range(parts):
        roles |= {part_file(f"{name}.onnx", index, parts): name for name in GRAPHS}
        roles[part_file(WEIGHTS, index, parts)] = "weights"
    if (folder / "ranges.json").exists():
        roles["ranges.json"] = "ranges"
    write_embedding(folder / "embedding.safetensors", quantized.embed())
    roles["embedding.safetensors"] = "embedding"
    config = json.dumps(quantized.config.to_dict(), indent=1) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    roles["config.json"] = "config"
    roles |= dict.fromkeys(copy_files(quantized.folder, folder, but=more or ()), "tokenizer")
    parameters = parameter_count(quantized.config)
    files = list_files(folder, roles)
    artifact = Artifact(
        format=kind,
        model=quantized.config,
        context=context,
        chunk=chunk,
        mask_value=mask_value,
        cache=cache,
        parameters=parameters,
        bits_per_weight=bits_per_weight(files, parameters),
        quantized_digest=quantized.digest(),
        producers={"bluelm-export": version("bluelm-export"), "onnx": version("onnx")},
        files=files,
    )
    artifact.save(folder)
    return artifact


def bits_per_weight(files: tuple[ArtifactFile, ...], parameters: int) -> float:
    """Of the files that hold weights: 8 bits a byte over the weights of the whole model."""
    held = sum(file.bytes for file in files if file.role in WEIGHT_ROLES)
    return round(8 * held / parameters, 4)


def parameter_count(config: ModelConfig) -> int:
    """Weights of the decoder; a table that is both embedding and head counts once."""
    block, hidden = block_of(config), config.hidden_size
    tables = (1 if config.shares_table else 2) * config.vocab_size * hidden
    norms = sum(norm.size for norm in block.norms.values())
    return tables + config.num_layers * (block.weights + norms) + hidden
