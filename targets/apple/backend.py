"""Apple's chips: Core ML packages, interpreted anywhere, compiled and run by Apple's own framework on a Mac.

What a compute unit takes is in `data/coreml.yaml`, each fact with where it comes from.
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from bluelm.system.progress import Progress
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.coreml import export as coreml
from export.coreml.ops import Activations
from export.coreml.package import Package
from targets.apple.macos import MacEngine, compile_package
from targets.apple.runtime import CoreMLRuntime, Interpreted
from targets.backend import LoweringJob, Uncompiled
from targets.socs import Soc

TABLE = Path(__file__).parents[1] / "data" / "coreml.yaml"


class Unit(BaseModel):
    """A compute unit.

    Attributes:
        activations: types that it computes in.
        state_multiple: the last dimension of a state must be a multiple of it.
        program_bytes: largest program that it loads; None where no limit is known.
        not_on_unit: ops that fall back to the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    activations: tuple[str, ...]
    state_multiple: int = 1
    program_bytes: int | None = None
    not_on_unit: tuple[str, ...] = ()


class Rules(BaseModel):
    """`units` by name; `ops`: the iOS version that first has an op as we use it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    units: dict[str, Unit]
    ops: dict[str, int]


@cache
def rules() -> Rules:
    """The whole table."""
    return Rules.model_validate(yaml.safe_load(TABLE.read_text(encoding="utf-8")))


def check_states(config: ModelConfig, context: int, unit: str = "ane") -> None:
    """
    Raises:
        TargetError: keys [.., head_dim, context] or values [.., context, head_dim] do not suit the unit.
    """
    multiple = rules().units[unit].state_multiple
    for name, width in (("a context", context), ("a head dimension", config.head_dim)):
        if width % multiple:
            below = width // multiple * multiple
            fit = f"{below} or {below + multiple}" if below else str(multiple)
            fix = f"use --context {fit}" if width == context else "this model needs another target"
            raise TargetError(f"{name} of {width}: Core ML states must be multiples of {multiple} wide", fix=fix)


def check_program(package: Package, ios: int = 18, unit: str = "ane") -> tuple[str, ...]:
    """Hold a saved package against the rules; returns the ops that this unit leaves to the CPU.

    Raises:
        TargetError: an op that this iOS version lacks, a state or a weight file that the unit refuses.
    """
    table, rule = rules(), rules().units[unit]
    kinds = sorted({op.type for name in package.functions for op in package.operations(name)})
    for kind in kinds:
        first = table.ops.get(kind)
        if first is None:
            raise TargetError(f"the op {kind!r} is not in the table of ops", where=TABLE, fix="add its iOS version")
        if first > ios:
            raise TargetError(f"the op {kind!r} needs iOS {first}, not {ios}", where=package.path)
    for name, function in package.functions.items():
        for value in function.inputs:
            shape = value.type.stateType.wrappedType.tensorType.dimensions
            if len(shape) and shape[-1].constant.size % rule.state_multiple:
                raise TargetError(
                    f"the state {value.name} is {shape[-1].constant.size} wide; {unit} wants multiples of "
                    f"{rule.state_multiple}",
                    where=f"{package.path}, function {name}",
                )
    weights = package.root / "weights" / "weight.bin"
    size = weights.stat().st_size if weights.exists() else 0
    if rule.program_bytes is not None and size > rule.program_bytes:
        raise TargetError(
            f"a program of {size:,} bytes; {unit} loads at most {rule.program_bytes:,}",
            where=package.path,
            fix="export in several programs",
        )
    return tuple(kind for kind in kinds if kind in rule.not_on_unit)


def check_activations(activations: Activations, unit: str = "ane") -> str | None:
    """None, or what to know of a type of activations that the unit does not compute in."""
    if activations in rules().units[unit].activations:
        return None
    return f"{activations} activations run on CPU and GPU: the Neural Engine computes in float16 alone"


def floats(bits: int) -> Activations:
    """The type of activations of so many bits."""
    return "float32" if bits == 32 else "float16"


class CoreMLBackend(Uncompiled):
    """Checks and lowers. A Mac compiles the package too, to see that Core ML takes it; an app compiles its own."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        check_states(config, context)

    def lower(self, job: LoweringJob) -> Artifact:
        activations = floats(job.float_bits)
        artifact = coreml.export(
            job.quantized,
            job.folder,
            context=job.context,
            chunk=job.chunk,
            activations=activations,
            progress=job.progress,
        )
        left = {op for path in coreml.packages(artifact) for op in check_program(Package.open(path))}
        known = [check_activations(activations)]
        known += [f"left to the CPU by the Neural Engine: {', '.join(sorted(left))}"] if left else []
        notes = (*artifact.notes, *(note for note in known if note))
        artifact.model_copy(update={"notes": notes}).save(job.folder)
        return Artifact.open(job.folder)

    def compile(self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None) -> Artifact:
        if sys.platform == "darwin":
            with tempfile.TemporaryDirectory(prefix="bluelm-mlmodelc-") as scratch:
                for path in coreml.packages(artifact):
                    compile_package(path, Path(scratch))
        return artifact  # the package is what an app ships; MLModel.compileModel(at:) runs on the device


def open_interpreter(artifact: Artifact, *, rounding: bool = True) -> CoreMLRuntime:
    """The artifact under our interpreter; without `rounding` in float32 throughout."""
    engines = [Interpreted(path, rounding=rounding) for path in coreml.packages(artifact)]
    return _runtime(artifact, "Core ML, interpreted", engines)


def open_mac(artifact: Artifact, unit: str) -> CoreMLRuntime:
    """The artifact under Apple's own runtime, on `cpu`, `gpu` or `ane`.

    Raises:
        UnavailableError: not macOS.
        TargetError: Core ML refuses it there.
    """
    engines = [MacEngine(path, unit) for path in coreml.packages(artifact)]
    return _runtime(artifact, f"Core ML on {unit}", engines)


def _runtime(artifact: Artifact, name: str, engines: list) -> CoreMLRuntime:
    if not engines:
        raise InputError("the artifact holds no .mlpackage", where=artifact.folder)
    return CoreMLRuntime(name, engines, artifact.model.vocab_size, artifact.context, artifact.model.num_layers)
