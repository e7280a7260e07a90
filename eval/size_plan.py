"""Bytes that a finished artifact should take, worked out from the quantized checkpoint: an unquantized layer shows.

Every format adds what describes its graphs; beside a model's weights that is next to nothing, beside a small model's it
is not, so each has an allowance a block (`data/size_plan.yaml`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from bluelm.config import ModelConfig
from compress.pieces import LinearInfo
from compress.store import EMBED, HEAD, QuantizedCheckpoint
from export.artifact import Artifact, Format
from export.package import WEIGHT_ROLES

TABLE = Path(__file__).parent / "data" / "size_plan.yaml"
WIDE = "float32 activations"
"""The note of an artifact whose program computes in float32, not float16: its constants are as wide."""


class Layout(BaseModel):
    """How a format holds numbers: bytes of each; `copies`: how often all but the embedding is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scale: float = 2
    row_scale: float = 2
    block: int | None = None
    copies: int = 1
    vector: float = 4
    rope: float = 4
    structure: int = 0


@cache
def layouts() -> dict[str, Layout]:
    """By format."""
    data = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: Layout.model_validate(row or {}) for name, row in data.items()}


def copies(kind: Format) -> int:
    """How often a format holds all but the embedding, once a graph where it shares nothing."""
    return layouts().get(kind, Layout()).copies


def planned_parts(quantized: QuantizedCheckpoint, artifact: Artifact) -> dict[str, int] | None:
    """Bytes of blocks, head, embedding and of what else has numbers; None for a format that is not in the table."""
    layout = layouts().get(artifact.format)
    if layout is None:
        return None
    first = next(name for name in quantized.linears if name not in (EMBED, HEAD))
    if quantized.ordered(first).weight.scales.dtype.itemsize == 4:  # a checkpoint that was quantized elsewhere
        layout = layout.model_copy(update={"scale": 4, "row_scale": 4})
    if WIDE in artifact.notes:
        vector, rope = 2 * layout.vector, 2 * layout.rope
        layout = layout.model_copy(update={"scale": 4, "row_scale": 4, "vector": vector, "rope": rope})
    parts = {"blocks": 0.0, "head": 0.0, "embedding": 0.0}
    for name, info in quantized.linears.items():
        part = "embedding" if name == EMBED else "head" if name == HEAD else "blocks"
        parts[part] += _linear(info, layout, table=name == EMBED)
    if quantized.config.shares_table:
        parts["head"] = _linear(quantized.linears[EMBED], layout)
    parts["norms and tables"] = _vectors(quantized.config, layout, artifact.context)
    return {name: round(size) for name, size in parts.items()}


def held_bytes(artifact: Artifact) -> int:
    """Bytes of the files that hold weights."""
    return sum(file.bytes for file in artifact.files if file.role in WEIGHT_ROLES)


def deviation(planned: int, artifact: Artifact) -> float:
    """By what share the files are larger or smaller than planned, beyond what may describe the graphs."""
    allowed = layouts()[artifact.format].structure * (artifact.model.num_layers + 1)
    more = held_bytes(artifact) - planned
    return max(more - allowed, -more, 0) / planned


def _linear(info: LinearInfo, layout: Layout, table: bool = False) -> float:
    rows, columns = info.shape
    groups = 1 if info.group_size == -1 else columns // info.group_size
    stored = groups if layout.block is None else columns // layout.block
    scale = layout.row_scale if stored == 1 else layout.scale
    zeros = 0 if info.symmetric else info.bits / 8
    size = rows * columns * info.bits / 8 + rows * stored * (scale + zeros)
    return size if table else layout.copies * size


def _vectors(config: ModelConfig, layout: Layout, context: int) -> float:
    norms = (2 * config.num_layers + 1) * config.hidden_size
    return layout.copies * (norms * layout.vector + 2 * context * config.head_dim * layout.rope)
