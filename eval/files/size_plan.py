"""Expected bytes of an artifact, from the quantized checkpoint: a layer left unquantized shows as a difference.

Every format adds a description of its graphs. It is negligible beside a large model's weights but not beside a small
model's, so each format has an allowance for each block (`export.formats.Sizes`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from bluelm.block import block_of
from bluelm.config import ModelConfig
from compress.checkpoint.pieces import LinearInfo
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.package import WEIGHT_ROLES
from export.formats import Sizes, Without

WIDE = "float32 activations"
"""The note of an artifact whose program computes in float32, not float16: its constants are as wide."""


def copies(artifact: Artifact) -> int:
    """How often its format holds all but the embedding, once a graph where it shares nothing."""
    sizes = artifact.record.sizes
    return 1 if isinstance(sizes, Without) else sizes.copies


def planned_parts(quantized: QuantizedCheckpoint, artifact: Artifact) -> dict[str, int] | None:
    """Bytes of blocks, head, embedding and of what else has numbers; None where how is not known."""
    layout = artifact.record.sizes
    if isinstance(layout, Without):
        return None
    first = next(name for name in quantized.linears if name not in (EMBED, HEAD))
    if quantized.ordered(first).weight.scales.dtype.itemsize == 4:  # a checkpoint that was quantized elsewhere
        layout = replace(layout, scale=4, row_scale=4)
    if WIDE in artifact.notes:
        vector, rope = 2 * layout.vector, 2 * layout.rope
        layout = replace(layout, scale=4, row_scale=4, vector=vector, rope=rope)
    parts = {"blocks": 0.0, "head": 0.0, "embedding": 0.0}
    for name, info in quantized.linears.items():
        part = "embedding" if name == EMBED else "head" if name == HEAD else "blocks"
        parts[part] += _linear(info, layout, table=name == EMBED)
    if quantized.config.shares_table and not layout.tied:
        parts["head"] = _linear(quantized.linears[EMBED], layout)
    parts["norms and tables"] = _vectors(quantized.config, layout, artifact.context)
    return {name: round(size) for name, size in parts.items()}


def held_bytes(artifact: Artifact) -> int:
    """Bytes of the files that hold weights."""
    return sum(file.bytes for file in artifact.files if file.role in WEIGHT_ROLES)


def deviation(planned: int, artifact: Artifact) -> float:
    """By what share the files are larger or smaller than planned, beyond what may describe the graphs."""
    sizes = artifact.record.sizes
    allowed = 0 if isinstance(sizes, Without) else sizes.structure * (artifact.model.num_layers + 1)
    more = held_bytes(artifact) - planned
    return max(more - allowed, -more, 0) / planned


def _linear(info: LinearInfo, layout: Sizes, table: bool = False) -> float:
    rows, columns = info.shape
    groups = 1 if info.group_size == -1 else columns // info.group_size
    stored = groups if layout.block is None else columns // math.gcd(columns // groups, layout.block)
    scale = layout.row_scale if stored == 1 else layout.scale
    zeros = 0 if info.symmetric else info.bits / 8
    size = rows * columns * info.bits / 8 + rows * stored * (scale + zeros)
    return size if table else layout.copies * size


def _vectors(config: ModelConfig, layout: Sizes, context: int) -> float:
    norms = config.num_layers * sum(norm.size for norm in block_of(config).norms.values()) + config.hidden_size
    return layout.copies * (norms * layout.vector + 2 * context * config.head_dim * layout.rope)
