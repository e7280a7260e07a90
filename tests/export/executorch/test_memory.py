"""Weights are in memory while their delegate is written, and else stand-ins for them."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from torch import Tensor
from torch.export import ExportedProgram

from export.executorch.memory import SHARED, shared_weights, stand_in, weights_when_serialized


def numbers(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 100, (8, 64), generator=generator, dtype=torch.int8)
    return {"codes": codes, "scales": torch.rand(8, 2, generator=generator)}


def test_weights_are_held_while_their_delegate_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["blocks.0.q", "head"]
    weights = {name: numbers(seed) for seed, name in enumerate(names)}
    kept = {name: {f"{name}.{part}": stand_in(tensor) for part, tensor in weights[name].items()} for name in names}
    for buffer, zeros in (item for held in kept.values() for item in held.items()):
        owner, _, part = buffer.rpartition(".")
        assert (zeros.shape, zeros.dtype) == (weights[owner][part].shape, weights[owner][part].dtype)
        assert not zeros.any()
    seen: list[str] = []

    def serialize(program: ExportedProgram, _specs: list[object]) -> int:
        for buffer, held in program.state_dict.items():
            owner, _, part = buffer.rpartition(".")
            assert torch.equal(held, weights[owner][part])
            seen.append(buffer)
        return len(seen)

    monkeypatch.setattr(XnnpackBackend, "preprocess", staticmethod(serialize))
    programs = [cast(ExportedProgram, SimpleNamespace(state_dict=dict(kept[name]))) for name in names]
    sources = {name: partial(weights.__getitem__, name) for name in names}
    with weights_when_serialized(sources):
        for name, program in zip(names, programs, strict=True):
            assert XnnpackBackend.preprocess(program, []) == len(seen)
            assert all(held is kept[name][buffer] for buffer, held in program.state_dict.items())
        with pytest.raises(RuntimeError, match="two delegates"):
            XnnpackBackend.preprocess(programs[0], [])
    assert seen == [buffer for name in names for buffer in kept[name]]
    with pytest.raises(RuntimeError, match="no delegate"), weights_when_serialized(sources):
        XnnpackBackend.preprocess(programs[0], [])
    del programs[0].state_dict[f"{names[0]}.scales"]
    with pytest.raises(RuntimeError, match="without its scales"), weights_when_serialized(sources):
        XnnpackBackend.preprocess(programs[0], [])


def test_large_tensors_are_shared_by_copies_for_a_while() -> None:
    large, small, other = torch.zeros(SHARED), torch.zeros(SHARED - 1), torch.nn.Parameter(torch.zeros(SHARED))
    with shared_weights():
        assert deepcopy(large) is large
        assert deepcopy(small) is not small and deepcopy(other) is not other
        assert torch.equal(deepcopy(small), small)
    assert deepcopy(large) is not large
    with pytest.raises(KeyError), shared_weights():
        raise KeyError
    assert deepcopy(large) is not large
