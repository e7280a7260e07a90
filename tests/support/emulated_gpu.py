"""A second device without one: tensors that say they are on `cuda`, computed on the CPU.

What a GPU would refuse is refused: an operator that is handed tensors of two devices, indices or a random generator
of the wrong one, and reading a tensor's memory as numpy. Values are the CPU's own, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("emulated")
DEVICE = torch.device("emulated", 0)
CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}  # between devices
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put"}  # take indices on the CPU as well


class OnDevice(Tensor):
    """A tensor on the emulated device; `held` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], held: Tensor) -> OnDevice:
        new = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        new.held = held
        return new

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held})"

    def tolist(self) -> list[Any]:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Emulation(TorchDispatchMode):
    """Lets `device="cuda"` make tensors of the emulated device."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0  # operators that ran on the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = run(func, args, kwargs or {})
        self.computed += isinstance(found, OnDevice)
        return found


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One operator on the CPU, its results on the device that a GPU would leave them on."""
    facts = _facts(func)
    tensors = list(_tensors((*args, *kwargs.values())))
    there = any(isinstance(tensor, OnDevice) for tensor in tensors)
    if there and func not in CROSSING:
        _check(facts, args, tensors)
    wanted = kwargs.get("device")
    if wanted is not None:
        there = torch.device(wanted).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if there and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: a generator of the CPU for a tensor on {DEVICE}")
    found = func(*map(_inside, args), **{key: _inside(value) for key, value in kwargs.items()})
    if facts.written:
        written = [args[place] if place < len(args) else kwargs[name] for name, place in facts.written]
        return written[0] if len(written) == 1 else tuple(written)
    return _outside(found) if there else found


@dataclass(frozen=True)
class _Facts:
    """What an operator's schema says; `written`: names and places of the arguments that it writes to and returns."""

    name: str
    pointwise: bool
    written: tuple[tuple[str, int], ...]


@cache
def _facts(func: Any) -> _Facts:
    schema = func._schema
    returns = any(value.alias_info is not None and value.alias_info.is_write for value in schema.returns)
    places = tuple(
        (argument.name, place)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return _Facts(schema.name, torch.Tag.pointwise in func.tags, places if returns else ())


def _check(facts: _Facts, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a GPU would."""
    indexing = facts.name in INDEXING
    if indexing:
        if not isinstance(args[0], OnDevice) and any(isinstance(index, OnDevice) for index in args[1]):
            raise RuntimeError(f"{facts.name}: indices on {DEVICE} into a tensor on the CPU")
        tensors = [args[0], *_tensors(args[2:])]
    scalars = facts.pointwise or indexing  # take a number on the CPU beside tensors on the device
    on_cpu = [t for t in tensors if not isinstance(t, OnDevice) and not (scalars and t.ndim == 0)]
    if on_cpu and len(on_cpu) < len(tensors):
        raise RuntimeError(f"{facts.name}: tensors on {DEVICE} and on the CPU")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _inside(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_inside, value))
    return value.held if isinstance(value, OnDevice) else value


def _outside(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_outside, value)) if isinstance(value, tuple) else list(map(_outside, value))
    return OnDevice(value) if isinstance(value, Tensor) else value


@contextmanager
def emulated() -> Iterator[Emulation]:
    """Within, `DEVICE` can be computed on."""
    with Emulation() as emulation:
        yield emulation
