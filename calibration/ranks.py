"""The processes of a distributed run, on one machine or several, and how they exchange data.

Started by torchrun, which gives each process its rank; in a single process every call below costs nothing. Sums are
added in the order of the ranks, never as a tree or a ring, so that the result does not depend on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bluelm.errors import InputError, InterruptedRun

LONGEST_WAIT = timedelta(hours=2)  # a rank that says nothing for so long counts as lost
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: 0 is the one that writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True for the one rank that writes."""
        return self.rank == 0

    def shared(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, on every rank; if making it fails there, it fails everywhere."""
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        if self.leads:
            try:
                said = [make(), None]
            except Exception as error:  # told to the others before it goes on
                with _lost():
                    dist.broadcast_object_list([None, error], src=0)
                raise
        with _lost():
            dist.broadcast_object_list(said, src=0)
        if said[1] is not None:
            raise said[1]
        return said[0]

    def gathered(self, value: Value) -> list[Value]:
        """Everybody's value, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(values, value)
        return values

    def total(self, addends: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        """Sum over all addends of all ranks, from the first of rank 0 to the last of the last, on every rank.

        Args:
            addends: this rank's, at least one; each a row of tensors of the same shapes. The first is overwritten.
        """
        first, *others = addends
        for place, tensor in enumerate(first):
            if self.rank:
                before = torch.empty_like(tensor)
                with _lost():
                    dist.recv(before, src=self.rank - 1)
                tensor.copy_(before.add_(tensor))
            for other in others:
                tensor.add_(other[place])
            if self.size > 1:
                with _lost():
                    if self.rank + 1 < self.size:
                        dist.send(tensor, dst=self.rank + 1)
                    dist.broadcast(tensor, src=self.size - 1)
        return first


ALONE = Ranks()


@contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started with this one; `ALONE` where it did not start this process.

    Raises:
        InputError: torchrun's environment is incomplete.
        InterruptedRun: another rank was lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} not set",
            fix="start it with: torchrun --nproc-per-node N -m pipeline quantize …",
        )
    with _lost():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


@contextmanager
def _lost() -> Iterator[None]:
    """From what torch.distributed raises when a peer is gone to an error that says so."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InterruptedRun(
            f"another rank of the run was lost: {reason}",
            fix="start the same torchrun command again: finished blocks are kept",
        ) from error
