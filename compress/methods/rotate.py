"""Rotations folded into the weights: outliers are spread over all channels, and nothing is left to do at run time.

RMSNorm without a weight commutes with an orthogonal R: norm(x R) = norm(x) R. So with every norm's weight folded into
the linears behind it, the whole residual stream can be turned (QuaRot, Ashkboos et al., 2024, arXiv 2404.00456):

    embedding           E            ->  E R
    reads the stream    W diag(g)    ->  W diag(g) R        q, k, v, gate, up, head; g the norm's weight, then 1
    writes to it        W            ->  Rᵀ W               o, down

and the values of each head by another Q, undone by o_proj: v -> Qᵀ v, o_h -> o_h Q. Keys and queries stay, as rotary
embedding does not commute with Q; what down_proj reads stays, as silu does not.

R is a Hadamard matrix with random signs. Where the width is no power of two, its odd factor is a cosine transform.

Embedding and head that are one table E part: the head becomes E diag(g) R with the last norm's weight g in it, which
cannot stand in the embedding E R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from bluelm.block import Block, Linear, block_of
from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.tensorfiles import TensorInfo
from compress.recipe import Recipe

ROWS = 1024  # turned at a time: bounds the memory of a table in float64


@dataclass(frozen=True)
class Rotation:
    """x -> x R for an orthogonal R [width, width], computed in float64.

    Attributes:
        signs: float64 [width], +1 or -1.
    """

    signs: Tensor

    @staticmethod
    def of(width: int, seed: int) -> Rotation:
        """The rotation of this width and seed."""
        generator = torch.Generator().manual_seed(seed)
        return Rotation(torch.randint(0, 2, (width,), generator=generator, dtype=torch.float64) * 2 - 1)

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [..., width] -> x R, float32 of the same shape."""
        return self.in_place(x.reshape(-1, x.shape[-1]).clone()).view(x.shape)

    def in_place(self, x: Tensor) -> Tensor:
        """The same of x [rows, width], which is overwritten and given back: a table is held once."""
        for rows in x.split(ROWS):
            rows.copy_(self._turn(rows.double() * self.signs))
        return x

    def rows(self, weight: Tensor) -> Tensor:
        """Rᵀ W, float32 [width, in]."""
        return self(weight.T).T.contiguous()

    def _turn(self, x: Tensor) -> Tensor:
        """x float64 [rows, width]."""
        width = x.shape[1]
        even = width & -width  # the largest power of two that divides it
        odd = width // even
        x = x.view(-1, odd, even)
        step = 1
        while step < even:  # one butterfly of the fast Walsh-Hadamard transform
            pairs = x.view(-1, odd, even // (2 * step), 2, step)
            x = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2)
            x = x.view(-1, odd, even)
            step *= 2
        x = x / math.sqrt(even)
        if odd > 1:
            x = torch.einsum("rie,ij->rje", x, cosines(odd))
        return x.reshape(-1, width)


def cosines(size: int) -> Tensor:
    """The orthogonal cosine transform (DCT-II), float64 [size, size]: dense, all entries of about one size."""
    at = torch.arange(size, dtype=torch.float64)
    table = torch.cos(math.pi * (2 * at[:, None] + 1) * at / (2 * size)) * math.sqrt(2 / size)
    table[:, 0] /= math.sqrt(2)
    return table


@dataclass(frozen=True)
class Rotated:
    """The weights of a checkpoint, turned as they are read; the function is the same, up to float32 rounding.

    Attributes:
        seed: of the signs.
    """

    source: Checkpoint
    seed: int = 0
    stream: Rotation = field(init=False)
    values: Rotation = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stream", Rotation.of(self.config.hidden_size, self.seed))
        object.__setattr__(self, "values", Rotation.of(self.config.head_dim, self.seed + 1))

    @property
    def config(self) -> ModelConfig:
        return parted(self.source.config)

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    def digest(self) -> str:
        """The checkpoint's own: that it is turned stands in the recipe."""
        return self.source.digest()

    def check_unchanged(self) -> None:
        """As the checkpoint's own."""
        self.source.check_unchanged()

    def block(self, index: int) -> dict[str, Tensor]:
        """Tensors of one block, float32, by local name; both norms are ones."""
        return rotate_block(block_of(self.config), self.source.block(index), self.stream, self.values)

    def embedding(self) -> Tensor:
        """float32 [rows, hidden]."""
        return self.stream.in_place(self.source.embedding())

    def final_norm(self) -> Tensor:
        """Ones, float32 [hidden]."""
        return torch.ones(self.config.hidden_size)

    def head(self) -> Tensor:
        """float32 [rows, hidden]."""
        return self.stream.in_place(self.source.head().mul_(self.source.final_norm()))


def as_quantized(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint | Rotated:
    """The float weights that the codes of a recipe stand for: the checkpoint's, turned where the recipe says so."""
    return Rotated(checkpoint) if recipe.rotate else checkpoint


def quantized_config(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """Of the weights that the codes of a recipe stand for."""
    return parted(config) if recipe.rotate else config


def parted(config: ModelConfig) -> ModelConfig:
    """With a head of its own."""
    return replace(config, tie_word_embeddings=False) if config.shares_table else config


def rotate_block(block: Block, tensors: Mapping[str, Tensor], stream: Rotation, values: Rotation) -> dict[str, Tensor]:
    """A block that reads and writes a turned stream.

    Args:
        tensors: float32 by local name.
        stream: of the residual stream; values: of each head's values.
    """
    turned = dict(tensors)
    for norm in block.norms.values():
        if norm.reads not in block.stream:
            continue
        gamma = tensors[f"{norm.weight}.weight"]
        for linear in block.readers(norm.makes):
            assert isinstance(linear, Linear)
            turned[f"{linear.weight}.weight"] = stream(tensors[f"{linear.weight}.weight"] * gamma)
        turned[f"{norm.weight}.weight"] = torch.ones_like(gamma)
    for branch in block.branches:
        name, bias = f"{branch.writer.weight}.weight", f"{branch.writer.weight}.bias"
        turned[name] = stream.rows(tensors[name])
        if branch.writer.biased:
            turned[bias] = stream(tensors[bias])
    move = next((move for move in block.moves if move.stage.name == block.attention.makes), None)
    if move is None:  # something between the values and the linears behind them that does not turn with them
        return turned
    size = len(values.signs)
    for kind in ("weight", "bias"):
        name = f"{move.before}.{kind}"
        if name in turned:  # [heads * size, in] or [heads * size]
            heads = turned[name].view(-1, size, turned[name][0].numel()).transpose(1, 2)
            turned[name] = values(heads).transpose(1, 2).reshape(turned[name].shape).contiguous()
    for linear in move.stage.linears:
        mixed = turned[f"{linear}.weight"]  # [hidden, heads * size]
        turned[f"{linear}.weight"] = values(mixed.view(len(mixed), -1, size)).view(mixed.shape)
    return turned
