"""Maps each tensor of the decoder to a checkpoint's tensors, and says how to convert it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bluelm.architectures import ARCHITECTURES
from bluelm.block import block_of
from bluelm.config import ModelConfig


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the decoder in the files.

    Attributes:
        name: of the tensor in the file.
        start: its first row there.
        rows: how many of them.
        of: rows of the whole tensor in the file.
    """

    name: str
    start: int
    rows: int
    of: int


def file_name(config: ModelConfig, name: str) -> str:
    """The name in the file of `model.layers.3.mlp.up_proj.weight` where it is not part of a fused tensor."""
    names = ARCHITECTURES[config.architecture].names
    place, local = _parted(name)
    return _renamed(names, place) + _renamed(names, local)


def source(config: ModelConfig, name: str, shapes: dict[str, tuple[int, ...]]) -> StoredTensor:
    """Where `name` lies; `shapes` holds the shape of every tensor of the decoder by its name."""
    place, local = _parted(name)
    stem, _, kind = local.rpartition(".")
    row = ARCHITECTURES[config.architecture]
    for fused, parts in row.fused.items():
        if stem in parts:
            rows = [shapes[f"{place}{part}.{kind}"][0] for part in parts]
            at = parts.index(stem)
            whole = f"{_renamed(row.names, place)}{fused}.{kind}"
            return StoredTensor(whole, sum(rows[:at]), rows[at], sum(rows))
    rows_here = shapes[name][0]
    return StoredTensor(file_name(config, name), 0, rows_here, rows_here)


def half_split(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """Rows of q and k (and of their biases and norms) so that dimension j of a head turns with j + head_dim / 2.

    A head of D dimensions of which the first r turn, in neighbouring pairs (0, 1), (2, 3), ...:

        0 1 2 3 .. r-1 | r .. D-1   becomes   0 2 .. r-2 | r .. || 1 3 .. r-1 | .. D-1

    and the pairs behind the first r / 2 have the frequency 0. Attention only sees the product of q and k, to
    which the order of the dimensions is nothing as long as both have the same.
    """
    row, size, turning = ARCHITECTURES[config.architecture], config.head_dim, config.rotary_dim
    local = _parted(name)[1].rpartition(".")[0]
    plain = row.rotary == "half-split" and turning == size
    if plain or local not in block_of(config).turned:
        return tensor
    turned = torch.arange(turning)
    pairs = turned.view(-1, 2).T if row.rotary == "interleaved" else turned.view(2, -1)  # [2, r / 2]
    still = torch.arange(turning, size).view(2, -1)  # [2, (D - r) / 2]
    order = torch.cat((pairs, still), dim=1).reshape(-1)  # [D]
    return tensor.unflatten(0, (-1, size))[:, order].flatten(0, 1)


def _parted(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj.weight` -> ("model.layers.3.", "mlp.up_proj.weight")."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return "", name
    return ".".join(parts[:3]) + ".", ".".join(parts[3:])


def _renamed(names: Mapping[str, str], name: str) -> str:
    old = max((old for old in names if name.startswith(old)), key=len, default="")
    return names[old] + name[len(old) :] if old else name
