"""Quantized Hugging Face folders, packed field by field with Python's integers: the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints.shapes import write_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Drawn:
    """A random quantized linear: W[i, j] = (codes[i, j] - zeros[i, group of j]) * scales[i, group of j]."""

    codes: np.ndarray  # integers [out, in]
    zeros: np.ndarray  # integers [out, groups]
    scales: Tensor  # [out, groups]
    groups: np.ndarray  # integers [in]
    bits: int

    @property
    def values(self) -> Tensor:
        """float32 [out, in], computed in float64."""
        scales = self.scales.double().numpy()[:, self.groups]
        return torch.from_numpy((self.codes - self.zeros[:, self.groups]) * scales).float()


def draw(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group: int = 16,
    symmetric: bool = False,
    scattered: bool = False,
    dtype: torch.dtype = torch.float16,
    lowest_zero: int = 1,
    seed: int = 0,
) -> Drawn:
    """A linear of weights of some hundredths; `scattered` columns belong to any group, each group to `group`."""
    generator = np.random.default_rng(seed)
    count = columns // group
    zeros = generator.integers(lowest_zero, 2**bits, (rows, count))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    groups = np.arange(columns) // group
    if scattered:
        groups = generator.permutation(groups)
    scales = torch.from_numpy(generator.uniform(0.5, 1.5, (rows, count)) * 2.0 ** (2 - bits) / 16).to(dtype)
    return Drawn(generator.integers(0, 2**bits, (rows, columns)), zeros, scales, groups, bits)


def words(fields: Sequence[int], bits: int) -> list[int]:
    """Fields of a row as signed 32-bit words, the first in the lowest bits."""
    count = 32 // bits
    found = []
    for start in range(0, len(fields), count):
        word = sum(int(field) << (bits * place) for place, field in enumerate(fields[start : start + count]))
        found.append(word - 2**32 if word >= 2**31 else word)
    return found


def packed_rows(fields: np.ndarray, bits: int) -> Tensor:
    """int32 [n, m * bits / 32] of fields [n, m]."""
    return torch.tensor([words(row.tolist(), bits) for row in fields], dtype=torch.int32)


def gptq(linear: Drawn, *, version: int = 1, g_idx: bool = True) -> dict[str, Tensor]:
    """AutoGPTQ's tensors of a linear."""
    stored = linear.zeros.T - (1 if version == 1 else 0)  # [groups, out]
    tensors = {
        "qweight": packed_rows(linear.codes, linear.bits).T.contiguous(),
        "qzeros": packed_rows(stored, linear.bits),
        "scales": linear.scales.T.contiguous(),
    }
    return tensors | ({"g_idx": torch.from_numpy(linear.groups).to(torch.int32)} if g_idx else {})


def awq(linear: Drawn) -> dict[str, Tensor]:
    """AutoAWQ's GEMM tensors of a linear."""

    def packed(fields: np.ndarray) -> Tensor:  # [n, out]
        rows, count = fields.shape
        return packed_rows(fields.reshape(rows, count // 8, 8)[..., AWQ_ORDER].reshape(rows, count), 4)

    return {
        "qweight": packed(linear.codes.T),
        "qzeros": packed(linear.zeros.T),
        "scales": linear.scales.T.contiguous(),
    }


def compressed(linear: Drawn, *, symmetric: bool = False) -> dict[str, Tensor]:
    """compressed-tensors' pack-quantized tensors of a linear."""
    tensors = {
        "weight_packed": packed_rows(linear.codes, linear.bits),
        "weight_scale": linear.scales.contiguous(),
        "weight_shape": torch.tensor(linear.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed_rows(linear.zeros.T, linear.bits).T.contiguous()
    if not np.array_equal(linear.groups, np.sort(linear.groups)):
        tensors["weight_g_idx"] = torch.from_numpy(linear.groups).to(torch.int32)
    return tensors


def write_packed(
    folder: Path,
    pack: Callable[[Drawn], dict[str, Tensor]],
    settings: dict[str, Any] | None,
    *,
    kept: tuple[str, ...] = (),
    shape: dict[str, Any] | None = None,
    **linear: Any,
) -> dict[str, Drawn]:
    """Turn a random float checkpoint into a quantized one; its linears by name.

    Args:
        settings: config.json's quantization_config; None leaves it out.
        kept: local names of linears that stay float.
        shape: as for `write_checkpoint`. linear: as for `draw`.
    """
    write_checkpoint(folder, **{"inner": 128, "dtype": torch.float16, **(shape or {})})
    tensors = load_file(folder / "model.safetensors")
    drawn: dict[str, Drawn] = {}
    for seed, name in enumerate(sorted(tensors)):
        if not name.endswith("proj.weight") or name.endswith(tuple(f"{local}.weight" for local in kept)):
            continue
        stem = name.removesuffix(".weight")
        rows, columns = tensors.pop(name).shape
        drawn[stem] = draw(rows, columns, seed=seed, **linear)
        tensors |= {f"{stem}.{local}": part for local, part in pack(drawn[stem]).items()}
    save_file(tensors, folder / "model.safetensors")
    if settings is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return drawn


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False}


CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head"],
}


def scheme(**weights: Any) -> dict[str, Any]:
    """compressed-tensors' settings with other words on the weights."""
    group = {"targets": ["Linear"], "weights": WEIGHTS | weights, "input_activations": None}
    return CT | {"config_groups": {"group_0": group}}


V1 = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "checkpoint_format": "gptq"}


V2 = V1 | {"checkpoint_format": "gptq_v2"}
