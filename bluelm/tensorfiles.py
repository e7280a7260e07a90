"""The tensor files of a checkpoint folder: finding them, listing their contents, reading one tensor.

Nothing stays open between two reads: a mapping that lives for one tensor gives its pages back after it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bluelm.errors import InputError
from bluelm.system.files import TRY_AGAIN, is_device_error, member
from bluelm.system.reading import MOST_TABLE_BYTES, open_regular, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
NAMES = FLOATS | INTEGERS


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that was not read yet: its shape, dtype (torch's name) and file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def list_tensors(folder: Path, *, any_name: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder by name, from headers and indexes alone.

    Looks for model.safetensors, its shards, pytorch_model.bin, its shards, in this order.

    Args:
        any_name: where there is none of these, take the only .safetensors, .bin or .pt file, as older
            quantizers name theirs (gptq_model-4bit-128g.safetensors).

    Raises:
        InputError: no tensor files; a damaged file; an index that names missing files or files outside the
            folder, or disagrees with its shards.
    """
    for single, index in ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX)):
        if (folder / single).exists():
            return tensors_of(member(folder, single))
        if (folder / index).exists():
            return _sharded(folder, index)
    for pattern in ("*.safetensors", "*.bin", "*.pt") if any_name else ():
        found = sorted(path.name for path in folder.glob(pattern))
        if len(found) == 1:
            return tensors_of(member(folder, found[0]))
        if found:
            raise InputError(
                f"{len(found)} files of weights and no index: {', '.join(found[:3])}",
                where=folder,
                fix=f"leave one of them, or name it {SINGLE}",
            )
    raise InputError(
        "the folder has no weights",
        where=folder,
        fix=f"it must hold {SINGLE} or {BIN_SINGLE}, or shards with their .index.json",
    )


def _sharded(folder: Path, index: str) -> dict[str, TensorInfo]:
    path = member(folder, index)
    names = read_json(path, MOST_TABLE_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise InputError("weight_map must name a file for every tensor", where=path, fix="fetch the index again")
    found: dict[str, TensorInfo] = {}
    paths = {shard: member(folder, shard) for shard in sorted(set(names.values()))}
    for shard, file in paths.items():
        for name, info in tensors_of(file).items():
            if name in found:
                raise InputError(f"{name} is in two shards", where=f"{found[name].file}, {info.file}")
            found[name] = info
            if names.get(name, shard) != shard:
                raise InputError(f"the index puts {name} into {names[name]}, but {shard} holds it", where=path)
    absent = sorted(set(names) - set(found))
    if absent:
        raise InputError(
            f"{_some(absent)} missing from {names[absent[0]]}, where the index puts it",
            where=path,
            fix="fetch the shard again",
        )
    return found


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more are" if len(names) > 1 else " is")


def tensors_of(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of one .safetensors or .bin file; the format goes by the first bytes.

    Raises:
        InputError: the file is damaged, or a pickle that wants to run code.
    """
    if _is_zip_or_pickle(path):
        return {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), path)
            for name, tensor in _load_bin(path).items()
        }
    found: dict[str, TensorInfo] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                piece = file.get_slice(name)
                dtype = str(piece.get_dtype())
                found[name] = TensorInfo(tuple(piece.get_shape()), NAMES.get(dtype, dtype.lower()), path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from None
    return found


def load_tensor(name: str, info: TensorInfo) -> Tensor:
    """One tensor as a float32 copy of its own, finite, read from a memory-mapped file.

    Raises:
        InputError: it is not floating point, has NaN or infinite values (also after the cast to float32), or
            the file changed since it was listed.
    """
    if info.dtype not in FLOATS.values():
        raise InputError(
            f"{name} holds {info.dtype}, not floating point",
            where=info.file,
            fix="give the float checkpoint, not a quantized one",
        )
    tensor = load_stored(name, info).to(torch.float32, copy=True).contiguous()
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{name} has {bad} NaN or infinite values of {tensor.numel()}",
            where=info.file,
            fix="fetch the file again, or take an earlier checkpoint of the training",
        )
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are; without a copy of the tensor if so."""
    # the sum of finite values can overflow, so a sum that is not finite only asks for the exact question
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def load_stored(name: str, info: TensorInfo) -> Tensor:
    """One tensor as it is stored, of any dtype; it may share memory with the file.

    Raises:
        InputError: the file is damaged, or changed since it was listed.
    """
    stored = _read(name, info)
    if tuple(stored.shape) != info.shape:
        raise InputError(f"{name} changed its shape while it was being read", where=info.file)
    return stored


def _read(name: str, info: TensorInfo) -> Tensor:
    if _is_zip_or_pickle(info.file):
        tensors = _load_bin(info.file)
        if name not in tensors:
            raise InputError(f"{name} vanished while the checkpoint was being read", where=info.file)
        return tensors[name]
    try:
        with safe_open(info.file, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(info.file, error) from None


def _is_zip_or_pickle(path: Path) -> bool:
    """True for torch.save's files: zip (since torch 1.6) or a bare pickle; safetensors never starts so."""
    try:
        with open_regular(path) as file:
            start = file.read(9)
    except OSError as error:
        raise _damaged(path, error) from None
    return path.suffix == ".bin" or start.startswith(b"PK\x03\x04")


def _load_bin(path: Path) -> dict[str, Tensor]:
    """The state dict of a torch.save file, memory-mapped; the unpickler makes tensors and runs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(
            path, error, fix="fetch it again, or convert it to safetensors if torch older than 1.6 wrote it"
        ) from None
    if packed:
        raise InputError("the archive is compressed; torch.save never writes that", where=path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            raise InputError(
                "the pickle wants to run code or holds more than tensors; it was not run",
                where=path,
                fix="take the checkpoint as safetensors, from a source you trust",
            ) from error
        raise _damaged(path, error) from error
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError("the file does not hold a dictionary of tensors", where=path)
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized:
            raise InputError(f"{name} is not a plain tensor", where=path, fix="save the model's state_dict")
    return dict(state)


def _damaged(path: Path, error: Exception, fix: str = "fetch it again") -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if is_device_error(error):
        return InputError(f"the file cannot be read: {reason}", where=path, fix=TRY_AGAIN)
    return InputError(f"the file is truncated or corrupt: {reason}", where=path, fix=fix)
