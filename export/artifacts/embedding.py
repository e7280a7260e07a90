"""The embedding table of an artifact: quantized rows in a file of their own, looked up on the CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bluelm.errors import InputError
from bluelm.system.reading import check_regular, parse_json
from compress.checkpoint.quantized import QuantizedTensor
from export.artifacts.packing import pack, unpack

MOST_HEADER = 1 << 16  # bytes; three tensors take a few hundred


def write_embedding(path: Path, table: QuantizedTensor) -> None:
    """Safetensors: codes uint8 [rows, bytes a row], scales float16 [rows, groups], zeros uint8 [rows,
    groups].

    4-bit codes lie two a byte, the first in the low half. A row is (codes - zeros) * scales; BlueLM's
    embedding LayerNorm is already in it.
    """
    tensors = {
        "codes": np.ascontiguousarray(pack(table.codes.numpy(), table.bits)),
        "scales": np.ascontiguousarray(table.scales.numpy()),
        "zeros": np.ascontiguousarray(table.zeros.numpy()),
    }
    about = json.dumps({"bits": table.bits, "hidden": table.shape[1]})
    save_file(tensors, path, metadata={"bluelm": about})  # one key: safetensors writes several in any order


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Where in the file each tensor lies: the first byte and the number of bytes.

    Raises:
        InputError: it is no safetensors file.
    """
    try:
        with check_regular(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(size, MOST_HEADER)).decode("utf-8"), path)
        spans = {name: about["data_offsets"] for name, about in header.items() if name != "__metadata__"}
        return {name: (8 + size + start, stop - start) for name, (start, stop) in spans.items()}
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"not an embedding table: {error}", where=path) from None


@dataclass(frozen=True)
class EmbeddingTable:
    """Rows by token id. Codes stay in the memory-mapped file; scales and zero points are in memory."""

    codes: Any  # a safetensors slice
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    hidden: int

    @staticmethod
    def open(path: Path) -> EmbeddingTable:
        """Map a file that `write_embedding` made.

        Raises:
            InputError: it is something else.
        """
        try:
            file = safe_open(check_regular(path), "numpy")
            about = parse_json((file.metadata() or {})["bluelm"], path)
            return EmbeddingTable(
                file.get_slice("codes"),
                file.get_tensor("scales"),
                file.get_tensor("zeros"),
                about["bits"],
                about["hidden"],
            )
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"not an embedding table: {error}", where=path) from None

    def __len__(self) -> int:
        return self.scales.shape[0]

    def rows(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [tokens, hidden]."""
        ids = np.asarray(tokens, np.int64)
        packed = np.concatenate([self.codes[token : token + 1] for token in ids.tolist()])
        codes = unpack(packed, self.bits, self.hidden).astype(np.float32)
        scales, zeros = self.scales[ids].astype(np.float32), self.zeros[ids].astype(np.float32)
        repeat = self.hidden // scales.shape[1]
        return (codes - zeros.repeat(repeat, axis=1)) * scales.repeat(repeat, axis=1)
