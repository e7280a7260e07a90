"""ExecuTorch with the Core ML delegate: a .pte whose methods `prefill` and `decode` are two functions of one package.

    decoder of static shapes -> torch.export -> CoreMLPartitioner -> coremltools -> .mlpackage inside the .pte

Codes and scales are constants of the torch program and become constexpr_blockwise_shift_scale as they are. The cache
goes in and out of each step: ExecuTorch loads every method with states of its own, so a state that prefill wrote is
not there for decode. Lowering runs anywhere; the package is compiled by the phone that loads the program.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bluelm.block import block_of
from bluelm.errors import ExportError, TargetError
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import MODEL, complete_steps
from export.coreml.importing import import_coremltools
from export.coreml.ops import MASKED, Activations, signed_codes
from export.executorch import static
from export.executorch.coreml_reader import unpack
from export.executorch.xnnpack import quiet


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    activations: Activations = "float16",
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`: model.pte, the embedding rows and the tokenizer's files.

    Args:
        context: tokens that the host's cache holds.
        chunk: tokens that `prefill` takes.

    Raises:
        TargetError: operators that Core ML does not take; they are named.
        ExportError: the finished program holds other codes or scales than the checkpoint.
        UnavailableError: coremltools is not installed.
    """
    import_coremltools()
    with (
        atomic_folder(folder) as temporary,
        (progress or Silent()).task("lower to ExecuTorch for Core ML", 3) as task,
        quiet(),
        _no_bars(),
    ):
        task.advance(note="torch.export")
        programs = static.trace(quantized, context=context, chunk=chunk, doubled_norms=True)
        task.advance(note="coremltools")
        left = static.write(programs, {name: _partitioner(activations) for name in programs}, temporary / MODEL)
        if left:
            raise TargetError(f"Core ML does not take the operators {', '.join(left)}")
        del programs
        task.advance(note="read back")
        check_program(temporary / MODEL, quantized)
        complete_steps(
            temporary,
            "executorch-coreml",
            quantized,
            context=context,
            chunk=chunk,
            mask_value=MASKED,
            producers=("executorch", "coremltools", "torch"),
            notes=(f"{activations} activations",),
        )
    return Artifact.open(folder)


def check_program(path: Path, quantized: QuantizedCheckpoint) -> None:
    """Read a .pte back: the weights of every method are the checkpoint's codes and scales.

    Raises:
        ExportError: they are not.
    """
    for name in other_weights(path, quantized):
        raise ExportError(f"the program holds other codes or scales of {name}", where=path)


def other_weights(path: Path, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Linears that a method of the .pte does not hold with the checkpoint's codes and scales.

    The weights of a method have no names of ours; they stand in the order of the model.
    """
    layers = range(quantized.config.num_layers)
    names = [
        *(f"model.layers.{layer}.{name}" for layer in layers for name in block_of(quantized.config).linears),
        "lm_head",
    ]
    with tempfile.TemporaryDirectory(prefix="bluelm-pte-") as scratch:
        program = unpack(path, Path(scratch))
        for method in program.methods.values():
            found = [v for _, v in program.package.constants(method.function) if "data" in v]
            left = [{key: program.package.value(value) for key, value in stored.items()} for stored in found]
            for name in names:
                index = next((i for i, values in enumerate(left) if _same(values, quantized, name)), None)
                if index is None:
                    yield name
                else:
                    left.pop(index)


def _same(values: dict[str, np.ndarray], quantized: QuantizedCheckpoint, name: str) -> bool:
    """Whether data, scale and offset of a constexpr are the tensor `name`'s, codes and zeros less their middle."""
    tensor = quantized.linear(name)
    zeros = tensor.zeros.numpy().astype(np.int16) - 2 ** (tensor.bits - 1)
    offset = values["offset"] if "offset" in values else np.zeros_like(zeros)
    return (
        np.array_equal(values["data"], signed_codes(tensor))
        and np.array_equal(values["scale"].astype(np.float16), tensor.scales.numpy())
        and np.array_equal(offset, zeros)
    )


def _partitioner(activations: Activations) -> Any:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    precision = coremltools.precision.FLOAT16 if activations == "float16" else coremltools.precision.FLOAT32
    return CoreMLPartitioner(
        compile_specs=CoreMLBackend.generate_compile_specs(
            minimum_deployment_target=coremltools.target.iOS18, compute_precision=precision
        )
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without coremltools' own progress bars, which would run through ours."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.passes import pass_pipeline

    places: list[tuple[Any, str]] = [(ops, "_tqdm"), (pass_pipeline, "tqdm")]
    kept = [getattr(module, name) for module, name in places]
    for (module, name), bar in zip(places, kept, strict=True):
        setattr(module, name, functools.partial(bar, disable=True))
    try:
        yield
    finally:
        for (module, name), bar in zip(places, kept, strict=True):
            setattr(module, name, bar)
