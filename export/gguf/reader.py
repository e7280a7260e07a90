"""Reading a GGUF file back with gguf-py, the format's own reader: as codes and scales, or as float
weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from bluelm.block import block_of
from bluelm.checkpoint import model_shapes
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.rope import inverse_frequencies
from bluelm.system.reading import check_regular
from compress.checkpoint.quantized import QuantizedTensor
from export.gguf.export import (
    BLOCK,
    F32,
    Q4,
    Q8,
    is_linear,
    plain_frequencies,
    reordered_heads,
    tensors,
)  # fmt: skip
from export.gguf.names import NAMES, architecture


class _Reader(gguf.GGUFReader):
    """gguf-py's, which otherwise takes what lies behind the end of the file for empty, as often as a count says."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) != int(count):
            raise ValueError("it ends too early")
        return found


class GgufFile:
    """What gguf-py reads from a file, whatever model it is of.

    Attributes:
        fields: the file's keys with their values.
        tensors: by name; `shape` names the inner size first.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError: not a GGUF file, or a cut one."""
        try:
            reader = _Reader(check_regular(path))
        except (ValueError, OSError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
            raise InputError(f"not a GGUF file: {error}", where=path, fix="export it again") from None
        self.path, self.fields = path, reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a tensor as they lie in the file, blocks of 32.

        Raises:
            InputError: there is no matrix of Q4_0 or Q8_0 blocks of that name.
        """
        tensor = self.tensors.get(name)
        if tensor is None or tensor.tensor_type not in (Q4, Q8) or len(tensor.shape) != 2:
            raise InputError(f"the file has no {name} of Q4_0 or Q8_0", where=self.path, fix="export it again")
        columns, rows = (int(size) for size in tensor.shape)
        blocks = np.asarray(tensor.data).view(np.uint8).reshape(rows, columns // BLOCK, -1)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]  # [out, blocks]
        body = blocks[..., 2:]
        if tensor.tensor_type == Q4:
            codes, bits = np.concatenate([body & 15, body >> 4], axis=-1), 4
        else:
            codes, bits = body ^ 128, 8
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
        flat = torch.from_numpy(codes.reshape(rows, columns).copy())
        return QuantizedTensor(flat, torch.from_numpy(scales.copy()), zeros, bits, BLOCK)

    def floats(self, name: str) -> Tensor:
        """A tensor as float32, blocks dequantized.

        Raises:
            InputError: values that are not finite.
        """
        tensor = self.tensors[name]
        with np.errstate(invalid="ignore"):
            values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        if not np.isfinite(values).all():
            raise InputError(f"{name} holds values that are not finite", where=self.path, fix="export it again")
        return torch.from_numpy(np.array(values, np.float32))

    def number(self, key: str) -> float:
        """A finite number of the file's keys.

        Raises:
            InputError: the file has none.
        """
        try:
            value = self.fields[key].contents()
        except (ValueError, LookupError, TypeError):
            value = None
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"the file has no {key}", where=self.path, fix="export it again")
        return float(value)


class GgufWeights:
    """A `Weights` of the numbers that gguf-py reads from the file; rows of q and k back in halves."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._config, self.file = config, GgufFile(path)
        self.fields = self.file.fields
        self._check_tensors(path)
        self._check_rope(path)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def block(self, index: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for local in block_of(self._config).shapes:
            linear, _, kind = local.rpartition(".")
            found[local] = self._in_halves(self.file.floats(f"blk.{index}.{NAMES[linear]}.{kind}"), linear)
        return found

    def embedding(self) -> Tensor:
        return self.file.floats("token_embd.weight")

    def final_norm(self) -> Tensor:
        return self.file.floats("output_norm.weight")

    def head(self) -> Tensor:
        return self.file.floats("output.weight")

    def quantized(self, name: str) -> QuantizedTensor:
        """As `GgufFile.quantized`."""
        return self.file.quantized(name)

    def frequencies(self) -> Tensor:
        """Angle per position of each pair, as llama.cpp computes it from the file, float32 [head_dim/2].

        Raises:
            InputError: the file says nothing of its rope.
        """
        kind = architecture(self._config)
        theta, size = (self.file.number(f"{kind}.rope.{key}") for key in ("freq_base", "dimension_count"))
        if theta <= 0 or size != self._config.head_dim:
            raise InputError(f"the file's rope has base {theta} over {size} values", fix="export it again")
        plain = plain_frequencies(theta, int(size))
        factors = self.file.floats("rope_freqs.weight") if "rope_freqs.weight" in self.file.tensors else torch.ones(1)
        return (plain / factors.double()).float()

    def _check_tensors(self, path: Path) -> None:
        """Every tensor of the model is there, in its shape and in a type that the exporter writes."""
        wanted = model_shapes(self._config)
        wanted |= {"rope.weight": (self._config.head_dim // 2,)}
        wanted.setdefault("lm_head.weight", wanted["model.embed_tokens.weight"])
        for name, source in tensors(self._config):
            shape = wanted[source if source.endswith(".bias") else f"{source}.weight"]
            found, types = self.file.tensors.get(name), (Q4, Q8) if is_linear(self._config, source) else (F32,)
            if found is None:
                raise InputError(f"the file has no {name}", where=path, fix="export it again")
            there = tuple(reversed(found.shape.tolist()))  # GGUF names the inner size first
            if there != shape or found.tensor_type not in types:
                told = f"{name} is {found.tensor_type.name} {list(there)}, this model needs {list(shape)}"
                raise InputError(told, where=path, fix="export it again")

    def _check_rope(self, path: Path) -> None:
        """What runs here takes the rope from config.json: the file must say the same."""
        if not torch.allclose(self.frequencies(), inverse_frequencies(self._config), rtol=1e-5, atol=1e-20):
            raise InputError("the file has another rope than the model", where=path, fix="export it again")

    def _in_halves(self, rows: Tensor, local: str) -> Tensor:
        """The inverse of `export.gguf.export.interleaved`, for q and k of a Llama."""
        heads = reordered_heads(self._config, local)
        if heads is None:
            return rows
        split = rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
        return split.transpose(1, 2).reshape(rows.shape)
