"""safetensors files of a Hugging Face folder, written as their tensors are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from bluelm.system.files import write_text

INDEX = "model.safetensors.index.json"


class Shards:
    """Tensors into files of at most `most` bytes of them, with an index where there are several.

    Args:
        kind: of the framework that they are for, in the files' metadata.
    """

    def __init__(self, folder: Path, most: int = 4 * 2**30, kind: str = "pt") -> None:
        self._folder, self._most, self._kind, self._files, self._bytes = folder, most, kind, 0, 0
        self._waiting: dict[str, Tensor] = {}
        self._places: dict[str, int] = {}
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors that go into one file."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._waiting and self._bytes + size > self._most:
            self._flush()
        self._waiting |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._bytes += size
        self._total += size

    def finish(self) -> list[str]:
        """Write the rest, give the files their names, and tell these."""
        self._flush()
        if self._files == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return ["model.safetensors"]
        names = [f"model-{number + 1:05}-of-{self._files:05}.safetensors" for number in range(self._files)]
        for number, name in enumerate(names):
            self._part(number).rename(self._folder / name)
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {tensor: names[number] for tensor, number in self._places.items()},
        }
        write_text(self._folder / INDEX, json.dumps(index, indent=1) + "\n")
        return [*names, INDEX]

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"

    def _flush(self) -> None:
        save_file(self._waiting, self._part(self._files), metadata={"format": self._kind})
        self._places |= dict.fromkeys(self._waiting, self._files)
        self._files, self._bytes, self._waiting = self._files + 1, 0, {}
