"""A piece of a quantized checkpoint: one self-describing safetensors file.

A quantized weight `name` is stored as `name.codes` (packed), `name.scales` (float16, seldom float32), unless
symmetric `name.zeros` (packed) and, where its columns are not as the inputs are, `name.order` (int32); a vector
under its own name. Widths, notes and the fingerprint of the run that made it
are JSON in the file's header, under one key: with several, safetensors writes them in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bluelm.errors import InputError
from bluelm.system.files import TRY_AGAIN, atomic_file, is_device_error
from bluelm.system.reading import check_regular, parse_json
from compress.checkpoint.packing import pack, unpack
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor

KEY = "bluelm"


@dataclass(frozen=True)
class Piece:
    """What one file holds; notes are plain JSON values by the weight's name."""

    linears: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    orders: Mapping[str, Tensor] = field(default_factory=dict)  # `OrderedWeight.order` of the linears that have one


@dataclass(frozen=True)
class LinearInfo:
    """A quantized weight that was not read yet."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    ordered: bool = False


@dataclass(frozen=True)
class Header:
    """What a piece says of itself."""

    fingerprint: str
    linears: Mapping[str, LinearInfo]
    vectors: tuple[str, ...]
    notes: Mapping[str, Any]


def write_piece(path: Path, piece: Piece, fingerprint: str) -> str:
    """Write a piece, all or nothing; the same content gives the same bytes, whose hex SHA-256 is returned."""
    tensors: dict[str, Tensor] = {name: vector.contiguous() for name, vector in piece.vectors.items()}
    infos: dict[str, dict[str, Any]] = {}
    for name, weight in piece.linears.items():
        tensors[f"{name}.codes"] = pack(weight.codes, weight.bits)
        tensors[f"{name}.scales"] = weight.scales.contiguous()
        if not weight.symmetric:
            tensors[f"{name}.zeros"] = pack(weight.zeros, weight.bits)
        infos[name] = {
            "shape": list(weight.shape),
            "bits": weight.bits,
            "group_size": weight.group_size,
            "symmetric": weight.symmetric,
        }
        if name in piece.orders:
            tensors[f"{name}.order"] = piece.orders[name].contiguous()
            infos[name]["ordered"] = True
    header = {
        "fingerprint": fingerprint,
        "linears": infos,
        "vectors": sorted(piece.vectors),
        "notes": dict(piece.notes),
    }
    data = save(tensors, metadata={KEY: json.dumps(header, sort_keys=True)})
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def read_header(path: Path) -> Header:
    """What a piece says of itself, without its tensors.

    Raises:
        InputError: there is no such file, it is damaged or not a piece.
    """
    try:
        with safe_open(check_regular(path), framework="pt") as file:
            header = parse_json((file.metadata() or {})[KEY], path)
        linears = {name: _info(name, told) for name, told in header["linears"].items()}
        if not isinstance(header["notes"], dict) or not isinstance(header["fingerprint"], str):
            raise ValueError("it does not say what it was made from")
        return Header(header["fingerprint"], linears, tuple(header["vectors"]), header["notes"])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise _damaged(path, error) from None


def _info(name: str, told: Mapping[str, Any]) -> LinearInfo:
    """What a header says of one linear; ValueError where no weight can be so."""
    rows, columns = told["shape"]
    info = LinearInfo((rows, columns), told["bits"], told["group_size"], told["symmetric"], told.get("ordered", False))
    numbers, flags = (rows, columns, info.bits, info.group_size), (info.symmetric, info.ordered)
    right = all(type(n) is int for n in numbers) and all(isinstance(flag, bool) for flag in flags)
    if not right or min(rows, columns) < 1 or not 1 <= info.bits <= 8 or info.group_size == 0 or info.group_size < -1:
        raise ValueError(f"{name} cannot have {info}")
    return info


def read_ordered(path: Path, name: str, info: LinearInfo) -> OrderedWeight:
    """One quantized weight, with the order of its columns.

    Raises:
        InputError: as for `read_linear`.
    """
    weight = read_linear(path, name, info)
    if not info.ordered:
        return OrderedWeight(weight)
    order = read_vector(path, f"{name}.order")
    if order.dtype != torch.int32 or not torch.equal(order.sort().values.long(), torch.arange(info.shape[1])):
        raise _damaged(path, ValueError(f"{name}.order is not an order of {info.shape[1]} columns"))
    return OrderedWeight(weight, order)


def read_linear(path: Path, name: str, info: LinearInfo) -> QuantizedTensor:
    """One quantized weight, its columns as they are stored.

    Raises:
        InputError: the file is damaged or does not hold it as `info` says.
    """
    rows, columns = info.shape
    try:
        with safe_open(check_regular(path), framework="pt") as file:
            codes = unpack(file.get_tensor(f"{name}.codes"), info.bits, columns)
            scales = file.get_tensor(f"{name}.scales")
            if info.symmetric:
                zeros = torch.full(scales.shape, 2 ** (info.bits - 1), dtype=torch.uint8)
            else:
                zeros = unpack(file.get_tensor(f"{name}.zeros"), info.bits, scales.shape[1])
        if codes.shape != (rows, columns):
            raise ValueError(f"{name} is {tuple(codes.shape)}, not {info.shape}")
        return QuantizedTensor(codes, scales, zeros, info.bits, info.group_size)
    except (SafetensorError, OSError, ValueError, RuntimeError, InputError) as error:
        raise _damaged(path, error) from None


def read_vector(path: Path, name: str) -> Tensor:
    """One vector, float32.

    Raises:
        InputError: the file is damaged or does not hold it.
    """
    try:
        with safe_open(check_regular(path), framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    if not path.exists():
        return InputError("a file of the quantized checkpoint is missing", where=path, fix="quantize again")
    if is_device_error(error):
        return InputError(f"the file cannot be read: {error}", where=path, fix=TRY_AGAIN)
    return InputError(f"damaged, or not part of a quantized checkpoint: {error}", where=path, fix="quantize again")
