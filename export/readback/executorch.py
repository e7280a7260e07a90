"""ExecuTorch programs, read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from compress.quantized import QuantizedTensor
from compress.store import EMBED, QuantizedCheckpoint
from export.artifact import Artifact
from export.readback.held import table_faults
from export.readback.items import linear_names


def xnnpack(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """The program's weights have no names: each of the checkpoint's must be among them, as often."""
    from export.executorch_reader import embedding_codes, read

    contents = read(artifact.path("model"))
    there = Counter(_fingerprint(weight) for weight in contents.linears)
    for name in linear_names(quantized):
        key = _fingerprint(quantized.linear(name))
        there[key] -= 1
        if there[key] < 0:
            yield name
    table = quantized.embed()
    wanted = table.signed_codes().numpy()
    if not any(np.array_equal(codes, wanted) for codes in embedding_codes(contents, table.shape)):
        yield EMBED


def coreml(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    from export.executorch_coreml import other_weights

    yield from other_weights(artifact.path("model"), quantized)
    yield from table_faults(artifact, quantized)


def _fingerprint(weight: QuantizedTensor) -> tuple[bytes, bytes, int, int]:
    return weight.codes.numpy().tobytes(), weight.scales.numpy().tobytes(), weight.bits, weight.groups
