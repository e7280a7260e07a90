"""Damage to numbers: the exporter is given another checkpoint than the one that its artifact is held against."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from tests.support import damage
from tests.support.damage import LAYER, Changed
from tests.support.damages.record import ALL, Damage


def one_code(whole: QuantizedCheckpoint) -> QuantizedCheckpoint:
    """One code of one matrix by one step."""

    def change(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        if name != f"model.layers.{LAYER}.self_attn.k_proj":
            return tensor
        codes = tensor.codes.clone()
        codes[0, 0] += 1 if codes[0, 0] < 2**tensor.bits - 1 else -1
        return replace(tensor, codes=codes)

    return Changed.of(whole, change)


def one_scale(whole: QuantizedCheckpoint) -> QuantizedCheckpoint:
    """The scale of one group of one row, halved: a power of two, which every format holds."""

    def change(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        if name != f"model.layers.{LAYER}.mlp.up_proj":
            return tensor
        scales = tensor.scales.clone()
        scales[3, 0] /= 2
        return replace(tensor, scales=scales)

    return Changed.of(whole, change)


def rows(whole: QuantizedCheckpoint, weight: str) -> QuantizedCheckpoint:
    """Two rows of a table in each other's place."""

    def change(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        if name != weight:
            return tensor
        order = [*range(100), 101, 100, *range(102, tensor.shape[0])]
        return replace(tensor, codes=tensor.codes[order], scales=tensor.scales[order], zeros=tensor.zeros[order])

    return Changed.of(whole, change)


def norm(whole: QuantizedCheckpoint, part: str, factor: float) -> QuantizedCheckpoint:
    """A norm's weights times `factor`."""

    def change(name: str, vector: Tensor) -> Tensor:
        return vector * factor if part in name else vector

    return Changed.of(whole, vectors=change)


ROWS = (
    Damage("scales", ALL, source=lambda q, _: damage.scales(q)),
    Damage("one scale", ALL, source=lambda q, _: one_scale(q)),
    Damage("one code", ALL, source=lambda q, _: one_code(q)),
    Damage("heads", ALL, source=lambda q, _: damage.heads(q)),
    Damage("unquantized", ALL, source=damage.unquantized),
    Damage("layer norm", ALL, source=damage.layer_norm),
    Damage("rows of the embedding", ALL, source=lambda q, _: rows(q, EMBED)),
    Damage("rows of the head", ALL, source=lambda q, _: rows(q, HEAD)),
    Damage("a norm of 1.02", ALL, source=lambda q, _: norm(q, f".{LAYER}.post_attention_layernorm", 1.02)),
    Damage("last norm of 1.02", ALL, source=lambda q, _: norm(q, "model.norm", 1.02)),
    Damage("eps 1e-2", ALL, source=lambda q, _: Changed.of(q, rms_norm_eps=1e-2)),
    Damage("rope", ALL, source=lambda q, _: damage.rope(q)),
    Damage("rope base 5 %", ALL, source=lambda q, _: damage.rope(q, 1.05)),
)
