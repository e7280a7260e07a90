"""Comparing a weight as a file holds it with the checkpoint's: one code, one scale or one zero point is enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED
from export.artifacts.embedding import write_embedding
from export.onnx.reader import HeldWeight
from export.readback.held import faults, listed, same, stored, table, table_faults

WANTED = QuantizedTensor(
    torch.arange(32, dtype=torch.uint8).view(4, 8) % 16,
    torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.125, 3.0], [4.0, 0.75]], dtype=torch.float16),
    torch.tensor([[8, 7], [3, 8], [0, 15], [8, 8]], dtype=torch.uint8),
    4,
    4,
)
HELD = stored(WANTED)


def but(array: np.ndarray, place: tuple[int, int], value: float) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


def test_the_same_is_the_same() -> None:
    assert same(WANTED, HELD)
    assert faults(WANTED, HELD) == []
    assert faults(WANTED, stored(WANTED)) == []
    wide = replace(HELD, scales=HELD.scales.astype(np.float32))  # another type of the same numbers
    assert same(WANTED, wide)


@pytest.mark.parametrize("place", [(0, 0), (2, 1), (3, 1)])
def test_one_number_is_enough(place: tuple[int, int]) -> None:
    assert HELD.zeros is not None
    scale, zero, code = HELD.scales[place], HELD.zeros[place], HELD.codes[place]
    for found, told in (
        (replace(HELD, codes=but(HELD.codes, place, code ^ 1)), ["codes"]),
        (replace(HELD, scales=but(HELD.scales, place, np.nextafter(scale, np.float16(9)))), ["scales"]),
        (replace(HELD, scales=but(HELD.scales, place, -scale)), ["scales"]),
        (replace(HELD, zeros=but(HELD.zeros, place, zero ^ 1)), ["zero points"]),
        (replace(HELD, spare=True), ["codes behind the last column"]),
        (replace(HELD, codes=HELD.codes ^ 1, zeros=HELD.zeros ^ 1), ["codes", "zero points"]),
    ):
        assert faults(WANTED, found) == told
        assert not same(WANTED, found)


def test_zero_points_that_a_file_leaves_out_are_the_middle_code() -> None:
    assert faults(WANTED, replace(HELD, zeros=None)) == ["zero points"]
    middle = QuantizedTensor(WANTED.codes, WANTED.scales, torch.full((4, 2), 8, dtype=torch.uint8), 4, 4)
    assert same(middle, replace(HELD, zeros=None))
    assert faults(middle, replace(HELD, zeros=np.full((4, 2), 7))) == ["zero points"]


def test_scales_may_be_repeated_over_smaller_blocks_exactly() -> None:
    assert HELD.zeros is not None
    smaller = replace(HELD, scales=HELD.scales.repeat(2, axis=1), zeros=HELD.zeros.repeat(2, axis=1))
    assert same(WANTED, smaller)
    assert smaller.zeros is not None
    assert faults(WANTED, replace(smaller, scales=but(smaller.scales, (1, 2), 2.001))) == ["scales"]
    assert faults(WANTED, replace(smaller, zeros=but(smaller.zeros, (1, 3), 9))) == ["zero points"]
    assert faults(WANTED, replace(HELD, scales=HELD.scales[:, :1])) == ["1 scales a row instead of 2"]
    three = np.concatenate([HELD.scales, HELD.scales[:, :1]], axis=1)
    assert faults(WANTED, replace(HELD, scales=three)) == ["3 scales a row instead of 2"]


def test_another_width_or_shape_is_told_first() -> None:
    assert faults(WANTED, replace(HELD, bits=8))[0].startswith("8 bits (4, 8) instead of 4 bits")
    assert faults(WANTED, replace(HELD, codes=HELD.codes[:3]))[0].startswith("4 bits (3, 8) instead of 4 bits")
    one_a_row = HeldWeight(HELD.codes.T.copy(), HELD.scales, HELD.zeros, 4)
    assert faults(WANTED, one_a_row)[0].startswith("4 bits (8, 4) instead of")


def test_three_names_are_listed() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_the_file_of_embedding_rows(tmp_path: Path) -> None:
    """Nine columns: the last byte of a row holds one code."""
    codes = torch.arange(27, dtype=torch.uint8).view(3, 9) % 16
    scales, zeros = torch.tensor([[1.0], [0.5], [2.0]], dtype=torch.float16), torch.full((3, 1), 8, dtype=torch.uint8)
    wanted = QuantizedTensor(codes, scales, zeros, 4, -1)
    artifact: Any = SimpleNamespace(path=lambda name: tmp_path / name)
    quantized: Any = SimpleNamespace(embed=lambda: wanted)
    moved, last = zeros.clone(), codes.clone()
    moved[2, 0], last[2, 8] = 7, 1
    for held, told in (
        (wanted, [EMBED]),
        (QuantizedTensor(last, scales, zeros, 4, -1), [f"{EMBED}: codes"]),
        (QuantizedTensor(codes, scales * 2, zeros, 4, -1), [f"{EMBED}: scales"]),
        (QuantizedTensor(codes, scales, moved, 4, -1), [f"{EMBED}: zero points"]),
        (
            QuantizedTensor(codes[:2], scales[:2], zeros[:2], 4, -1),
            [f"{EMBED}: 4 bits (2, 9) instead of 4 bits (3, 9)"],
        ),
    ):
        write_embedding(tmp_path / "embedding", held)
        assert [str(finding) for finding in table(artifact, quantized)] == told
        assert list(table_faults(artifact, quantized)) == ([] if held is wanted else [EMBED])
