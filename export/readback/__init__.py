"""Whether a finished artifact holds the codes and scales of a quantized checkpoint: read from its files again.

Also from what Qualcomm's compiler wrote, which does not tell all. MediaTek's cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from compress.store import QuantizedCheckpoint
from export.artifact import Artifact, Format
from export.readback import compiled, coreml, executorch, genai, gguf, litert, onnx
from export.readback.compiled import COPIES
from export.readback.held import linear_names, listed, same

__all__ = ["COPIES", "ReadBack", "differing", "linear_names", "listed", "read_back", "readable", "same"]


@dataclass(frozen=True)
class ReadBack:
    """What an artifact's files tell of a checkpoint's weights.

    Attributes:
        wrong: names of those whose codes or scales are others, or that the artifact does not hold as such.
        untold: what the files do not tell, a sentence each.
    """

    wrong: list[str]
    untold: list[str] = field(default_factory=list[str])


def read_back(artifact: Artifact, quantized: QuantizedCheckpoint) -> ReadBack | None:
    """Hold the artifact's codes and scales against the checkpoint's; None where the format cannot be read.

    Raises:
        InputError: a file is damaged.
    """
    if artifact.format in COPIES:
        return ReadBack(*compiled.faults(artifact, quantized))
    reader = _READERS.get(artifact.format)
    return None if reader is None else ReadBack(list(dict.fromkeys(reader(artifact, quantized))))


def differing(artifact: Artifact, quantized: QuantizedCheckpoint) -> list[str] | None:
    """The weights that `read_back` finds wrong."""
    found = read_back(artifact, quantized)
    return None if found is None else found.wrong


def readable(artifact: Artifact) -> bool:
    """Whether the format's codes and scales can be read back."""
    return artifact.format in _READERS or artifact.format in COPIES


_READERS: dict[Format, Callable[[Artifact, QuantizedCheckpoint], Iterator[str]]] = {
    "onnx-cpu": onnx.faults,
    "onnx-npu": onnx.faults,
    "onnx-genai": genai.faults,
    "litert": litert.faults,
    "executorch-xnnpack": executorch.xnnpack,
    "executorch-coreml": executorch.coreml,
    "gguf": gguf.faults,
    "coreml": coreml.faults,
}
