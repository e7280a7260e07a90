"""Opens an artifact so that each block's output can be seen, through a debug build where needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np

from bluelm.errors import InputError
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact, source_of
from export.artifacts.debug import DEBUG_NOTE, debug_build
from export.formats import function
from targets.runtime import Place, Runtime, open_runtime


@runtime_checkable
class BlockRuntime(Runtime, Protocol):
    """A `Runtime` that shows its blocks."""

    def blocks(self, tokens: list[int]) -> np.ndarray:
        """The stream before the first block and behind each, float32 [layers + 1, n, hidden]; begins anew."""
        ...


@runtime_checkable
class ValueRuntime(BlockRuntime, Protocol):
    """One that shows values inside its blocks as well."""

    def values(self, tokens: Sequence[int], names: Collection[str]) -> dict[str, np.ndarray]:
        """Values by name, as `export/lowering/decoder.py` calls them; begins anew."""
        ...


class BlockTwin:
    """The build of an artifact that shows its blocks; made and loaded when it is first asked for."""

    def __init__(self, artifact: Artifact, on: Place, scratch: Path) -> None:
        self._open = lambda: open_blocks(artifact, on, scratch)
        self._runtime: BlockRuntime | None = None

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """The stream before the first block and behind each, float32 [layers + 1, n, hidden]."""
        return self._opened().blocks(list(tokens))

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [n, vocab]: the artifact's own, unless the two differ."""
        return self._opened().logits(list(tokens))

    def close(self) -> None:
        """Free what was opened."""
        if self._runtime is not None:
            self._runtime.close()

    def _opened(self) -> BlockRuntime:
        if self._runtime is None:
            self._runtime = self._open()
        return self._runtime


def open_blocks(artifact: Artifact, on: Place, scratch: Path, values: Sequence[str] = ()) -> BlockRuntime:
    """A runtime that shows its blocks; a `ValueRuntime` where its graphs are opened up here.

    ONNX and LiteRT graphs are given block outputs in a debug build below `scratch`. What the Core ML interpreter runs
    and what torch runs (GGUF) needs none. An XNNPACK program is built once more around the weights that it holds. What
    is compiled shows nothing: it is compiled again from the ONNX artifact beside it.

    Raises:
        InputError: the artifact has nothing to make a debug build from.
    """
    if artifact.record.blocks == "source":
        artifact = source_of(artifact)
    if artifact.record.rebuild is not None and DEBUG_NOTE not in artifact.notes:
        build: Builder = function(artifact.record.rebuild)
        artifact = build(artifact, _checkpoint_of(artifact), scratch / f"{artifact.format}-debug")
    if artifact.record.blocks == "rewritten":
        artifact = debug_build(artifact, scratch / f"{artifact.format}-debug", values)
    runtime = open_runtime(artifact.folder, on)
    if not isinstance(runtime, BlockRuntime):
        runtime.close()
        raise InputError(f"a {artifact.format} artifact cannot show its blocks", where=artifact.folder)
    return runtime


def xnnpack_debug(artifact: Artifact, quantized: QuantizedCheckpoint, folder: Path) -> Artifact:
    """The program once more around the weights that it holds, its blocks shown."""
    from export.artifacts.mobile import KvBits
    from export.executorch import xnnpack as executorch
    from export.executorch.held import held

    bits = {"float32": 32, "float16": 16, "int8": 8}[artifact.cache]
    return executorch.export(
        held(artifact.path("model"), quantized),
        folder,
        context=artifact.context,
        chunk=artifact.chunk,
        kv_bits=cast(KvBits, bits),
        debug=True,
    )


Builder = Callable[[Artifact, QuantizedCheckpoint, Path], Artifact]


def _checkpoint_of(artifact: Artifact) -> QuantizedCheckpoint:
    """The quantized checkpoint in the same run folder that the artifact was made from."""
    for path in sorted(artifact.folder.resolve().parent.glob("*/quantized.json")):
        quantized = QuantizedCheckpoint.open(path.parent)
        if quantized.digest() == artifact.quantized_digest:
            return quantized
    raise InputError(
        f"an {artifact.format} artifact does not show its blocks, and the quantized checkpoint it holds is not here",
        where=artifact.folder,
        fix="compare the run folder that holds both",
    )
