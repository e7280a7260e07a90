"""Memory, disk and time that a run will take: estimated beforehand, compared with --max-memory and the outcome."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.table import Table

from bluelm.checkpoint import Checkpoint, file_shapes
from bluelm.errors import InputError, UnavailableError
from compress.cost import Cost, cost, matmul_rate, table_size
from compress.methods.rotate import quantized_config
from compress.recipe import Recipe, parse_size
from eval.accuracy.positions import ROWS
from eval.heldout import LENGTH
from export.formats import Sizes, record

if TYPE_CHECKING:
    import torch

MARGIN = 1.05  # a limit must leave beside the estimate, which runs have gone beyond by up to 3 %
SHARE = 0.8  # of the memory that is free now, what activations may bring the run to where no limit is given
GRAPH_BYTES = 0.1e6  # of one block in one of the two graphs of an artifact
RUNTIMES = 0.6e9  # bytes of a runtime with its process, and of the exporters
BESIDE_SECONDS = 10.0  # inspecting the artifacts, measuring the speed, writing the pages
LOWERED_BYTES_PER_SECOND = 50e6  # through exporter and compiler, beyond `Lowering`
SIMULATOR_RATE = 0.6e9  # operations a second of the NPU's simulator, which runs whole chunks
SIMULATED_CHUNKS = 25  # beside the judged text: the positions of the context, what it continues, blocks and their twins
SMALL_PRODUCTS = 3.0  # how much slower judging is than the rate of large products


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
    if MARGIN * found.memory > room and recipe.reads_text:
        found = cost(checkpoint, recipe, on_disk=True, ranks=ranks, rate=rate)
    needed = MARGIN * found.memory
    if limit is not None and needed > limit:
        enough = f"give --max-memory {needed / 1e9 + 0.05:.1f}GB or more"
        raise InputError(
            f"quantizing this model takes about {_gb(found.memory)}, {_gb(needed)} to be safe: "
            f"more than --max-memory {_gb(limit)}",
            fix=f"{enough}; a shorter --length takes less" if recipe.reads_text else enough,
        )
    return Resources(found, found.memory, found.seconds, found.disk, None, limit)


def plan_run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    max_memory: str | None,
    *,
    runtime: str,
    context: int,
    chunk: int,
    watched_tokens: int,
    cpu_tokens: int,
    npu_tokens: int,
) -> Resources:
    """What a whole run takes: quantizing, lowering, judging.

    Args:
        runtime, context, chunk: of the artifact.
        watched_tokens: that activation ranges are taken from.
        cpu_tokens, npu_tokens: judged on the CPU, and on the NPU's simulator (0: there is none).

    Raises:
        InputError: quantizing or lowering does not fit into the memory, or the limit is not a size.
    """
    quantizing = plan_quantizing(checkpoint, recipe, max_memory)
    config, limit = quantized_config(checkpoint.config, recipe), quantizing.limit
    size = quantizing.quantizing.size
    kind = record(runtime)
    if config.shares_table and not (isinstance(kind.sizes, Sizes) and kind.sizes.tied):
        size += table_size(config, recipe)  # rows to look up, and once more as the head
    row = kind.lowering
    copies = kind.sizes.copies if isinstance(kind.sizes, Sizes) else 1
    artifact = copies * size + 2 * GRAPH_BYTES * config.num_layers
    weights = sum(math.prod(shape) for shape in file_shapes(config).values())
    processes = 2 * (RUNTIMES / 2 + row.process) if npu_tokens else 0.0
    answers = 4 * min(ROWS, context) * config.vocab_size  # of the weights in float32, which artifacts are held against
    held = max((run.weight_bytes for run in kind.runs.values()), default=0.0) * weights
    windows = 4 * 4 * min(LENGTH, context) * config.vocab_size  # logits of a window: two sides', twice
    judging = RUNTIMES + processes + 2 * artifact + 4 * weights + held + answers + windows  # runtimes repack weights
    room = psutil.virtual_memory().available if limit is None else limit
    if judging > room:  # it is then left out, and said so
        judging = RUNTIMES + artifact
    compiled = size - config.vocab_size * config.hidden_size * recipe.embed_bits / 8
    lowering = RUNTIMES + max(size, row.memory * min(compiled, row.part or compiled))
    if limit is not None and lowering > limit:
        raise InputError(
            f"lowering and compiling for {runtime} take about {_gb(lowering)}: more than --max-memory {_gb(limit)}",
            fix=f"give --max-memory {lowering / 1e9 + 0.05:.1f}GB or more, or another --runtime",
        )
    simulated = npu_tokens + SIMULATED_CHUNKS * chunk if npu_tokens else 0
    products = (2 * cpu_tokens + watched_tokens) * SMALL_PRODUCTS / matmul_rate() + simulated / SIMULATOR_RATE
    seconds = quantizing.seconds + lowering_seconds(runtime, config.num_layers, artifact) + BESIDE_SECONDS
    seconds += 2 * weights * products
    return Resources(
        quantizing.quantizing,
        max(quantizing.memory, judging, lowering),
        seconds,
        quantizing.disk + (4 if npu_tokens else 1) * artifact,
        artifact,
        limit,
    )


def lowering_seconds(runtime: str, blocks: int, artifact: float) -> float:
    """Of lowering and compiling an artifact of so many bytes."""
    row = record(runtime).lowering
    return row.whole + row.block * blocks + 4 * artifact / LOWERED_BYTES_PER_SECOND


def bytes_of(text: str) -> int:
    """A size with its unit: KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Raises:
        InputError: it is not a size above 0.
    """
    try:
        size = parse_size(text)
    except ValueError:
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
    known = not number or (kind == "cuda" and number.isdecimal() and len(number) < 6)
    if kind not in ("cpu", "cuda") or not known:
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
