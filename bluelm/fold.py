"""Folds operations on single rows of a table into the table, which gives an equivalent plain Llama."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 8192  # bounds the temporary copies to a few percent of a large table


def fold_layer_norm(table: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of every row of `table`, in place.

    A LayerNorm right behind the embedding acts on one vocabulary row at a time, so it can be done once:
    LayerNorm(table[token]) == LayerNorm(table)[token].

    Args:
        table: float32 [rows, hidden]; overwritten and returned.
        weight, bias: float32 [hidden].
        eps: the LayerNorm's epsilon; BlueLM uses rms_norm_eps, 1e-6.
    """
    for rows in table.split(ROWS_AT_ONCE):
        rows.copy_(F.layer_norm(rows, weight.shape, weight, bias, eps))
    return table


def normalise_rows(table: Tensor) -> Tensor:
    """Every row of `table` [rows, hidden] divided by its length, in place: Baichuan 2's NormHead."""
    for rows in table.split(ROWS_AT_ONCE):
        rows.copy_(F.normalize(rows))
    return table
