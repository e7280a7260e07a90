"""What the decoder, calibration and judging need of any checkpoint, float or quantized."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bluelm.config import ModelConfig


class Weights(Protocol):
    """A decoder's weights, read a piece at a time. All tensors float32."""

    @property
    def config(self) -> ModelConfig: ...

    def block(self, index: int) -> dict[str, Tensor]:
        """Tensors of one block by local name, e.g. `mlp.up_proj.weight` [out, in]; norms are [hidden]."""
        ...

    def embedding(self) -> Tensor:
        """Token embedding [rows, hidden] with the embedding LayerNorm, if the model has one, folded in."""
        ...

    def final_norm(self) -> Tensor:
        """Weight of the last RMSNorm [hidden]."""
        ...

    def head(self) -> Tensor:
        """Output projection [rows, hidden]; the embedding where the two are tied."""
        ...
