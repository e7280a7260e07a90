"""What a run will take of this machine: worked out beforehand, held against --max-memory, compared afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError, UnavailableError
from compress.cost import Cost, cost, matmul_rate
from compress.recipe import Recipe

if TYPE_CHECKING:
    import torch

SHARE = 0.8  # of the memory that is free now, what activations may bring the run to where no limit is given


@dataclass(frozen=True)
class Resources:
    """The estimate of a run, and what it may take.

    Attributes:
        quantizing: the stage that decides in large models.
        memory: bytes at the fullest moment of the whole run.
        seconds: of the whole run.
        disk: bytes written, at most.
        artifact: bytes of what ships; None where nothing but quantizing is asked for.
        limit: bytes of --max-memory, if given.
    """

    quantizing: Cost
    memory: float
    seconds: float
    disk: float
    artifact: float | None = None
    limit: int | None = None


def plan_quantizing(checkpoint: Checkpoint, recipe: Recipe, max_memory: str | None, ranks: int = 1) -> Resources:
    """What quantizing takes, with activations in RAM if that fits, else on disk.

    Args:
        max_memory: "8GB", "6 GiB", bytes; of one rank.

    Raises:
        InputError: it fits neither way, or the limit is not a size.
    """
    limit = None if max_memory is None else bytes_of(max_memory)
    rate = matmul_rate()
    room = limit if limit is not None else SHARE * psutil.virtual_memory().available / ranks
    found = cost(checkpoint, recipe, on_disk=False, ranks=ranks, rate=rate)
    if found.memory > room and recipe.reads_text:
        found = cost(checkpoint, recipe, on_disk=True, ranks=ranks, rate=rate)
    if limit is not None and found.memory > limit:
        raise InputError(
            f"quantizing this model takes about {_gb(found.memory)}, more than --max-memory {_gb(limit)}",
            fix=f"give --max-memory {found.memory / 1e9 + 0.05:.1f}GB or more; a shorter --length takes less"
            if recipe.reads_text
            else f"give --max-memory {found.memory / 1e9 + 0.05:.1f}GB or more",
        )
    return Resources(found, found.memory, found.seconds, found.disk, None, limit)


def bytes_of(text: str) -> int:
    """A size with its unit: KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Raises:
        InputError: it is not a size above 0.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise InputError(f"--max-memory {text!r} is not a size", fix="write it like 8GB or 6.5GiB")
    return size


def check_disk(resources: Resources, out: Path) -> None:
    """Make sure that the disk has room.

    Raises:
        InputError: it has not.
    """
    place = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = psutil.disk_usage(str(place)).free
    if resources.disk > free:
        raise InputError(
            f"the run takes about {_gb(resources.disk)} of disk, {_gb(free)} are free",
            where=place,
            fix="free some space, or name another output folder",
        )


def compute_device(name: str) -> torch.device:
    """The device to compute on: cpu, cuda, or cuda:N.

    Under torchrun, `cuda` is the rank's own GPU of its machine.

    Raises:
        InputError: another name. UnavailableError: there is no such GPU here.
    """
    import torch

    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise InputError(f"there is no device {name!r}", fix="give cpu, cuda, or cuda:0 for one GPU of several")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA driver or GPU"
        )
        raise UnavailableError(f"there is no CUDA device: {why}", fix="give --device cpu, or install a CUDA torch")
    index = int(number) if number else int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise UnavailableError(f"there is no GPU {index}", fix=f"this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def show_resources(resources: Resources, output: Console) -> None:
    """The estimate as a small table."""
    table = Table("estimate", "", title="What it takes (estimates)", title_justify="left", show_header=False)
    limit = "" if resources.limit is None else f", --max-memory {_gb(resources.limit)}"
    place = "on disk" if resources.quantizing.on_disk else "in RAM"
    table.add_row("peak memory", f"{_gb(resources.memory)}{limit}")
    if resources.quantizing.activations:
        table.add_row("activations", f"{_gb(resources.quantizing.activations)}, {place}")
    table.add_row("disk, at most", _gb(resources.disk))
    table.add_row("time, alone on this machine", duration(resources.seconds))
    if resources.artifact is None:
        table.add_row("quantized checkpoint", _gb(resources.quantizing.size))
    else:
        table.add_row("artifact", _gb(resources.artifact))
    output.print(table)


def how_far_off(resources: Resources, memory: float, seconds: float) -> str:
    """One line: what was planned beside what it took."""
    return (
        f"Planned {_gb(resources.memory)} of memory and {duration(resources.seconds)}; it took {_gb(memory)} "
        f"({_off(memory, resources.memory)}) and {duration(seconds)} ({_off(seconds, resources.seconds)})."
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _off(found: float, planned: float) -> str:
    share = found / planned - 1
    return f"{abs(share):.0%} {'more' if share > 0 else 'less'}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
