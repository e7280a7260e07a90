"""Every format of an artifact: one record with everything that any part of the product needs to know about it.

Each part looks a format up here and keeps no table of its own, so that a format cannot be forgotten somewhere and
judged less strictly there. What a format does not have is written as `Without` a reason. Functions of higher layers are
named by import path ("package.module:name") and imported when they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import resolve_name
from typing import Any, Literal

from bluelm.errors import InputError

Place = Literal["cpu", "htp", "arm64", "interpreter", "gpu", "ane", "device"]
"""Where an artifact runs; `device`: on a phone alone, nothing here can load it."""
Numbers = Literal[8, 16, 32]
"""Bits of a cached key or value, or of an activation; 16 and 32 are floats on CPUs and in Core ML, integers on NPUs."""
Arithmetic = Literal["float32", "float16", "16-bit activations", "8-bit activations"]
SpeedClass = Literal["cpu", "gpu", "npu", "ane"]
Blocks = Literal["rewritten", "runtime", "built again", "source"]
MODULES = ("onnx", "qnn", "coreml", "executorch", "litert", "gguf", "mlx", "coreai")


@dataclass(frozen=True)
class Without:
    """In place of what a format does not have.

    Attributes:
        reason: a clause for errors and reports.
    """

    reason: str

    def __bool__(self) -> Literal[False]:
        return False


@dataclass(frozen=True)
class Run:
    """One way to run an artifact on this machine.

    Attributes:
        opener: of a function (Artifact) -> Runtime.
        package: distribution that runs it; its version stands beside figures.
        stands_in: what this is in place of the phone's runtime, which makes its figures emulated; "": it is that
            runtime itself.
        options: more arguments of the opener.
        weight_bytes: of memory for each weight, beside what the artifact's own bytes take.
    """

    opener: str
    package: str
    stands_in: str = ""
    options: tuple[Any, ...] = ()
    weight_bytes: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """How a format holds numbers, in bytes (`eval/files/size_plan.py`).

    Attributes:
        scale, row_scale, vector, rope: of scales of groups, of rows, of vectors' and rope tables' numbers.
        block: it repeats scales over blocks of so many columns at most.
        copies: how often all but the embedding is there.
        structure: what may describe the graphs, for each block and once more.
        tied: a head that is the embedding's table reads it there; else it is stored once more.
    """

    scale: float = 2
    row_scale: float = 2
    block: int | None = None
    copies: int = 1
    vector: float = 4
    rope: float = 4
    structure: int = 0
    tied: bool = False


@dataclass(frozen=True)
class Lowering:
    """What lowering and compiling take, alone on two x86 cores, measured on the demo checkpoint (6 blocks).

    Attributes:
        whole, block: seconds, and for each block; what wider blocks add is worked out from the artifact's bytes.
        memory: bytes that a vendor's compiler takes for a byte of weights, at most for a part of `part` bytes
            (benchmarks/speed/runtimes.md).
        process: bytes that each of the two simulators takes more.
    """

    whole: float
    block: float
    memory: float = 0.0
    part: float | None = None
    process: float = 0.0


@dataclass(frozen=True)
class Speed:
    """Which published figures speak for its speed on a phone (`eval/speed/speed_model.py`).

    Attributes:
        published_as: the runtime's name there; "": nobody published figures of this one.
    """

    unit: SpeedClass
    published_as: str = ""


@dataclass(frozen=True)
class StandardRunner:
    """The program that users open an artifact with, run here as it is, or what stands in for it.

    Attributes:
        name: in `--with` and reports.
        opener: of a function (Artifact, StandardRunner) -> targets.runners.runner.Runner.
        package: distribution that brings it, a row of `targets/data/tools.yaml`. needs: others that it does not bring.
        allowance: of a function (TorchRuntime, prompts, last) -> eval.accuracy.arithmetic.Allowance: what the program's
            arithmetic may cost with these weights; None: what the format's may.
        begins: whether it puts in front of a text what begins one; else texts are compared without.
        continues: whether a chat's last answer can be left open; else it is compared closed.
        asks_always: it asks for an answer behind any last message, also behind an answer.
        leaves_out: of a function (text, Tokenizer) -> text without what the program is known to read otherwise by a
            limit of its own; texts of other tokens are compared again so. misreads: what that is, in words.
        probabilities: whether it tells any; else the format's own runtime does, on the same file, and what the program
            says must be likeliest there. scores: it tells those of a text's tokens, which must be the runtime's.
        ends_at_once: whether an answer may end with its first token; else it must with its second.
        prompts: on how many prompts its probabilities are told at most; few where a step takes seconds.
        fills_up: it fills a prompt up to whole chunks, which count among the context's tokens.
        stands_in: what this is in place of, and why, a clause; it makes the figures emulated. "": it is that program.
    """

    name: str
    opener: str
    package: str
    allowance: str | None = None
    needs: tuple[str, ...] = ()
    begins: Literal[True] | Without = True
    continues: Literal[True] | Without = True
    asks_always: bool = False
    leaves_out: str | None = None
    misreads: str = ""
    probabilities: Literal[True] | Without = True
    scores: bool = False
    ends_at_once: Literal[True] | Without = True
    prompts: int | None = None
    fills_up: bool = False
    stands_in: str = ""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one format is.

    Attributes:
        name: in artifact.json, `--runtime`, budgets.
        targets: names that `--target` takes which offer it as `--runtime`.
        tools: rows of `targets/data/tools.yaml` that lowering needs. optional_tools: that running it here needs.
        package: distribution that runs or reads it here.
        backend: class of `targets.backend.Backend`.
        compiled_from: the format that a vendor's compiler makes it of.
        cache_widths: that `--kv-bits` may choose, the default first; one alone is no choice.
        float_widths: that `--activation-bits` may choose, the default first, where activations are floats of a choice.
        ranges: whether lowering needs calibrated ranges of the activations, for any cache or an 8-bit one alone.
        runs: where it runs on this machine, the natural place first.
        runner: the program that users open it with; the gate holds what that reads and answers against the checkpoint.
        runs_as_shipped: whether what ships is what runs here; else a form beside it does.
        one_chip: it is compiled for the one chip of its target, and no other phone loads it.
        reader: function (Artifact, QuantizedCheckpoint) -> Iterator[Finding] that reads it back.
        ends: function (Artifact, end tokens) -> what a file names otherwise, or None.
        made: files that it makes of the tokenizer for its runner; its reader holds them against the checkpoint's.
        arithmetic: what its linears compute in, which says what it may cost (`eval/data/runtime_kl.yaml`).
        levels: a linear of its graph can say that it rounds activations to 8 bits.
        encodings: its activations are rounded to scales that the file holds; those of an 8-bit cache apart.
        block_error: relative L2 error of what one block adds to the stream, against the same weights in float32: the
            largest that is expected, three times what was measured on the demo (benchmarks/accuracy/block_damage.md).
        sizes: what its files should take.
        lowering: what making it takes.
        speed: whose published figures speak for it.
        blocks: how the outputs of its blocks are seen: its graphs are `rewritten` with more outputs, its `runtime` here
            shows them, the program is `built again` around its weights, or the `source` that it was compiled from is.
        graphs: roles of the graphs that are rewritten. open_up: function (Artifact, from, to, values) that does it.
        rebuild: function that builds it again, for `built again`.
        blocks_in_runs: whether a run looks at its blocks; else `bluelm-export bisect` does, as it takes long.
        inside: whether values inside a block are seen; else it is looked at as a whole.
        host_cache: this side keeps the KV cache, so that a step can be put behind empty slots.
        reorders: its graph puts the inputs of a linear in another order, as act-order needs.
        delegate: the ExecuTorch delegate that must take all of its program.
        app: row of `export/bundle/data/runtimes.yaml`: what executes it in an app.
        device_program: row of `targets/data/device_programs.yaml`: the runtime's own benchmark program on a phone.
        untold: what no check here can know of it, beside what its reader does not tell: a sentence each.
    """

    name: str
    targets: tuple[str, ...]
    tools: tuple[str, ...]
    optional_tools: tuple[str, ...] = ()
    package: str
    backend: str | Without
    compiled_from: str | None = None
    cache_widths: tuple[Numbers, ...]
    float_widths: tuple[Numbers, ...] = ()
    ranges: Literal["never", "for an 8-bit cache", "always"]
    runs: Mapping[Place, Run]
    runner: StandardRunner | Without
    runs_as_shipped: bool | Without
    one_chip: bool | Without
    reader: str | Without
    ends: str | Without
    made: tuple[str, ...] | Without
    arithmetic: Arithmetic
    levels: bool | Without
    encodings: bool | Without
    block_error: float
    sizes: Sizes | Without
    lowering: Lowering
    speed: Speed | Without
    blocks: Blocks | Without
    graphs: tuple[str, ...] = ()
    open_up: str | None = None
    rebuild: str | None = None
    blocks_in_runs: bool | Without
    inside: bool | Without
    host_cache: bool | Without
    reorders: bool | Without
    delegate: str | Without
    app: str | Without
    device_program: str | Without
    untold: tuple[str, ...] | Without

    @property
    def activation_bytes(self) -> int:
        """Of one activation."""
        return 2 if self.arithmetic in ("float16", "16-bit activations") else 4

    @property
    def lowered_as(self) -> str:
        """The format that our exporter writes: itself, unless a vendor's compiler makes it of another."""
        return self.compiled_from or self.name


def records() -> dict[str, Record]:
    """All of them by name, in the order of `MODULES`."""
    return _records()


def names() -> tuple[str, ...]:
    """All that artifact.json and `--runtime` may say."""
    return tuple(_records())


def record(name: str) -> Record:
    """The record of a format.

    Raises:
        InputError: there is none; the known ones are listed.
    """
    if name not in _records():
        raise InputError(f"unknown format {name!r}", fix=f"known formats: {', '.join(_records())}")
    return _records()[name]


def function(path: str) -> Any:
    """What an import path ("package.module:name") names."""
    return resolve_name(path)


@contextmanager
def added(new: Record) -> Iterator[None]:
    """One more format for as long as the context lasts, e.g. of another distribution."""
    if new.name in _records():
        raise InputError(f"there is a format {new.name!r} already", fix="choose another name")
    _records()[new.name] = new
    try:
        yield
    finally:
        del _records()[new.name]


@cache
def _records() -> dict[str, Record]:
    modules = [import_module(f"{__name__}.{name}") for name in MODULES]
    return {row.name: row for module in modules for row in module.RECORDS}
