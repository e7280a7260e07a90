"""Tensors of MLX's safetensors files, as MLX reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from bluelm.errors import InputError


class MlxFiles:
    """All `model*.safetensors` of a folder, one tensor in memory at a time.

    Raises:
        InputError: there is none, one cannot be read, or two hold a tensor of the same name.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, Path] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            try:
                with safe_open(path, "np") as file:
                    names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise InputError(f"the file cannot be read: {error}", where=path, fix="export it again") from None
            twice = next((name for name in names if name in self._places), None)
            if twice is not None:
                raise InputError(f"{twice} stands in {self._places[twice].name} too", where=path)
            self._places |= dict.fromkeys(names, path)
        if not self._places:
            raise InputError("the folder holds no model*.safetensors", where=folder, fix="export it again")

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return {*self._places}

    def get(self, name: str) -> np.ndarray | None:
        """A tensor; None where there is none of that name."""
        if name not in self._places:
            return None
        with safe_open(self._places[name], "np") as file:
            return file.get_tensor(name)

    def quantized(self, name: str, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes uint8 [out, in], scales and biases [out, groups] of a weight of so many bits.

        Raises:
            InputError: a part is missing, or the words are no uint32 in rows.
        """
        words, scales, biases = (self.get(f"{name}.{part}") for part in ("weight", "scales", "biases"))
        if words is None or scales is None or biases is None:
            raise InputError("is missing, or not quantized", where=name)
        if words.dtype != np.uint32 or words.ndim != 2 or bits not in (2, 4, 8):
            raise InputError(f"{bits} bits in {words.dtype} of shape {list(words.shape)}", where=name)
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        codes = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
        return codes.reshape(len(words), -1).astype(np.uint8), scales, biases


def effective(config: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Group size and bits of a weight, as config.json says them: for all, or for this one.

    Raises:
        InputError: it says neither, or another mode than "affine".
    """
    told = config.get("quantization")
    held = told.get(name, told) if isinstance(told, dict) else None
    if not isinstance(told, dict) or not isinstance(held, dict) or told.get("mode", "affine") != "affine":
        raise InputError("config.json does not say how it is quantized", where=name)
    group, bits = held.get("group_size"), held.get("bits")
    if type(group) is not int or type(bits) is not int or group <= 0:
        raise InputError(f"config.json says {bits} bits in groups of {group}", where=name)
    return group, bits
