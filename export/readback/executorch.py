"""ExecuTorch programs for Core ML, read back."""

from __future__ import annotations

from collections.abc import Iterator

from compress.store import QuantizedCheckpoint
from export.artifact import Artifact
from export.readback.held import table_faults


def coreml(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    from export.executorch_coreml import other_weights

    yield from other_weights(artifact.path("model"), quantized)
    yield from table_faults(artifact, quantized)
