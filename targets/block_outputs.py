"""Opens an artifact so that each block's output can be seen, through a debug build where needed."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

import numpy as np

from bluelm.errors import InputError
from export.artifact import Artifact
from export.debug import DEBUG_NOTE, REWRITTEN, debug_build
from targets.runtime import Place, Runtime, open_runtime


class BlockRuntime(Runtime, Protocol):
    """A `Runtime` that shows its blocks."""

    def blocks(self, tokens: list[int]) -> np.ndarray:
        """The stream before the first block and behind each, float32 [layers + 1, n, hidden]; begins anew."""
        ...


def open_blocks(artifact: Artifact, on: Place, scratch: Path) -> BlockRuntime:
    """A runtime with `blocks`.

    ONNX and LiteRT graphs are given block outputs in a debug build below `scratch`; a qnn-context, which is
    compiled, is built from the ONNX artifact beside it; what the Core ML interpreter runs needs no debug build.
    An ExecuTorch program cannot be opened up: it is exported once more from the quantized checkpoint beside it.

    Raises:
        InputError: the artifact has nothing to make a debug build from.
    """
    if artifact.format == "qnn-context":
        artifact = _source_of(artifact)
    if artifact.format == "executorch-xnnpack" and DEBUG_NOTE not in artifact.notes:
        artifact = _executorch_debug(artifact, scratch / "executorch-debug")
    if artifact.format in REWRITTEN:
        artifact = debug_build(artifact, scratch / f"{artifact.format}-debug")
    runtime = open_runtime(artifact.folder, on)
    if not hasattr(runtime, "blocks"):
        runtime.close()
        raise InputError(f"a {artifact.format} artifact cannot show its blocks", where=artifact.folder)
    return cast(BlockRuntime, runtime)


def _executorch_debug(artifact: Artifact, folder: Path) -> Artifact:
    """The same program once more with its blocks shown, from the quantized checkpoint in the same run folder."""
    from compress.store import QuantizedCheckpoint
    from export import executorch
    from export.mobile_package import KvBits

    for path in sorted(artifact.folder.resolve().parent.glob("*/quantized.json")):
        quantized = QuantizedCheckpoint.open(path.parent)
        if quantized.digest() == artifact.quantized_digest:
            bits = {"float32": 32, "float16": 16, "int8": 8}[artifact.cache]
            return executorch.export(
                quantized,
                folder,
                context=artifact.context,
                chunk=artifact.chunk,
                kv_bits=cast(KvBits, bits),
                debug=True,
            )
    raise InputError(
        "an ExecuTorch program does not show its blocks, and the quantized checkpoint it holds is not here",
        where=artifact.folder,
        fix="compare the run folder that holds both",
    )


def _source_of(artifact: Artifact) -> Artifact:
    """The onnx-npu artifact in the same run folder that holds the same quantized checkpoint."""
    for path in sorted(artifact.folder.resolve().parent.glob("*/artifact.json")):
        other = Artifact.open(path.parent)
        if other.format == "onnx-npu" and other.quantized_digest == artifact.quantized_digest:
            return other.model_copy(update={"soc": artifact.soc})
    raise InputError(
        "a compiled artifact does not show its blocks, and the ONNX artifact it was made from is not here",
        where=artifact.folder,
        fix="compare the run folder that holds both, or the onnx-npu artifact itself",
    )
