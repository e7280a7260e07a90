"""Opens an artifact so that each block's output can be seen, through a debug build where needed."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

import numpy as np

from bluelm.errors import InputError
from export.artifact import Artifact
from export.onnx_debug import debug_build
from targets.runtime import Place, Runtime, open_runtime


class BlockRuntime(Runtime, Protocol):
    """A `Runtime` that shows its blocks."""

    def blocks(self, tokens: list[int]) -> np.ndarray:
        """The stream before the first block and behind each, float32 [layers + 1, n, hidden]; begins anew."""
        ...


def open_blocks(artifact: Artifact, on: Place, scratch: Path) -> BlockRuntime:
    """A runtime with `blocks`.

    ONNX graphs are given block outputs in a debug build below `scratch`; a qnn-context, which is compiled, is
    built from the ONNX artifact beside it; what the Core ML interpreter runs needs no debug build.

    Raises:
        InputError: the artifact has nothing to make a debug build from.
    """
    if artifact.format == "qnn-context":
        artifact = _source_of(artifact)
    if artifact.format in ("onnx-cpu", "onnx-npu"):
        artifact = debug_build(artifact, scratch / f"{artifact.format}-debug")
    runtime = open_runtime(artifact.folder, on)
    if not hasattr(runtime, "blocks"):
        runtime.close()
        raise InputError(f"a {artifact.format} artifact cannot show its blocks", where=artifact.folder)
    return cast(BlockRuntime, runtime)


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
