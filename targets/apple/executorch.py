"""Apple's chips through ExecuTorch's Core ML delegate: the package in the .pte, interpreted anywhere, run on a Mac.

The host keeps the cache, as for the ONNX artifacts. On a Mac the package runs on a named compute unit through Core ML
itself; which unit a phone takes is ExecuTorch's choice (all of them).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil

from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.coreml.export import PROGRAM_BYTES
from export.lowering.decoder import block_output
from targets.apple.backend import floats
from targets.apple.interpreter.interpreter import Function, Interpreter
from targets.apple.macos import MacModels
from targets.backend import LoweringJob, Uncompiled
from targets.host.cached_runtime import CachedRuntime, Feeds
from targets.legality import weight_bytes
from targets.socs import Soc
from targets.tools import require

METHODS = ("prefill", "decode")
LOWERING = 25  # bytes of memory for a byte of weights: coremltools holds many copies (benchmarks/speed/coreml.md)


class Functions(Protocol):
    """Runs a function of the package that has no states."""

    def __call__(self, function: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]: ...


class ExecutorchCoreMLBackend(Uncompiled):
    """Lowers on any machine; the phone compiles."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        block, head = weight_bytes(config, recipe)
        total = config.num_layers * block + head
        if total > PROGRAM_BYTES:
            raise TargetError(
                f"{total / 1e9:.1f} GB of weights do not fit one program of {PROGRAM_BYTES / 1e9:.1f} GB",
                fix="use --runtime coreml, which cuts the model into several programs",
            )
        needed, available = LOWERING * total, psutil.virtual_memory().available
        if needed > available:
            raise TargetError(
                f"lowering takes about {needed / 1e9:.0f} GB of memory (an estimate), "
                f"{available / 1e9:.0f} GB are available",
                fix="use --runtime coreml, which streams weights, or lower on a larger machine",
            )

    def lower(self, job: LoweringJob) -> Artifact:
        require("executorch")
        from export.executorch import coreml as executorch_coreml

        return executorch_coreml.export(
            job.quantized,
            job.folder,
            context=job.context,
            chunk=job.chunk,
            activations=floats(job.float_bits),
            progress=job.progress,
        )


class ExecutorchCoreMLRuntime(CachedRuntime):
    """Both methods of a .pte, its package run by the interpreter or, with `unit`, by Core ML on a Mac."""

    def __init__(self, artifact: Artifact, scratch: tempfile.TemporaryDirectory[str], unit: str | None) -> None:
        from export.executorch.coreml_reader import unpack
        from export.executorch.static import input_names, output_names

        self._scratch = scratch
        program = unpack(artifact.path("model"), Path(scratch.name))
        if missing := [name for name in METHODS if name not in program.methods]:
            raise InputError(f"the program has no method {missing[0]!r}", where=artifact.folder)
        layers = artifact.model.num_layers
        watched: dict[str, tuple[str, ...]] = {}
        if unit is None:
            interpreter = Interpreter(program.package)
            watched = {m.function: streams(interpreter.function(m.function), layers) for m in program.methods.values()}

            def run(function: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
                return interpreter.run(inputs, function=function, watch=watched[function])

        else:
            models = MacModels(program.package.path, unit, [m.function for m in program.methods.values()])

            def run(function: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
                return models.predict(function, inputs)

        names = tuple(input_names(artifact.model)), tuple(output_names(artifact.model))

        def step(name: str, feeds: Feeds) -> Mapping[str, np.ndarray]:
            method = program.methods[name]
            inputs = {theirs: feeds[ours] for ours, theirs in zip(names[0], method.inputs, strict=True)}
            found = run(method.function, inputs)
            outputs = {ours: found[theirs] for ours, theirs in zip(names[1], method.outputs, strict=True)}
            blocks = watched.get(method.function, ())
            return outputs | {block_output(layer): found[value] for layer, value in enumerate(blocks)}

        where = "interpreted" if unit is None else f"on {unit}"
        super().__init__(f"{artifact.format}, {where}", artifact, *(partial(step, name) for name in METHODS))

    def close(self) -> None:
        self._scratch.cleanup()


def streams(function: Function, layers: int) -> tuple[str, ...]:
    """Names of the stream behind each block: the input `hidden`, and every second sum that it enters.

        hidden -cast-> x0 ; x0 + attended -> x ; x + down -> x1 (block 0) ; x1 + attended -> ...

    Raises:
        InputError: the function has no such chain of two sums a block.
    """
    stream, sums = "hidden", []
    for step in function.steps:
        given = [name for name in step.arguments.values() if isinstance(name, str)]
        if stream in given and step.type in ("add", "cast"):
            stream = step.outputs[0][0]
            sums += [stream] if step.type == "add" else []
    if len(sums) != 2 * layers:
        raise InputError(f"function {function.name} adds {len(sums)} times to its stream, {2 * layers} are expected")
    return tuple(sums[1::2])


def open_executorch_coreml(artifact: Artifact, unit: str | None = None) -> ExecutorchCoreMLRuntime:
    """The program's package under our interpreter or, on a Mac, under Core ML on `cpu`, `gpu` or `ane`.

    Raises:
        UnavailableError: ExecuTorch or coremltools is not installed; a unit was named and this is no Mac.
        InputError: the program is damaged.
    """
    require("executorch")
    scratch = tempfile.TemporaryDirectory(prefix="bluelm-pte-")
    try:
        return ExecutorchCoreMLRuntime(artifact, scratch, unit)
    except BaseException:
        scratch.cleanup()
        raise
