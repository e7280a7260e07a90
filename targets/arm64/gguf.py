"""GGUF artifacts on this machine: the weights that gguf-py reads from the file, in the float decoder.

No build of llama.cpp is assumed here, so this judges the file, not llama.cpp's kernels; its name says so.
"""

from __future__ import annotations

from export.artifacts.artifact import Artifact
from targets.host.torch_runtime import TorchRuntime
from targets.tools import require


def open_gguf(artifact: Artifact) -> TorchRuntime:
    """The file's weights in torch.

    Raises:
        UnavailableError: gguf-py is not installed.
        InputError: the file is damaged.
    """
    require("gguf")
    from export.gguf.reader import GgufWeights

    weights = GgufWeights(artifact.path("model"), artifact.model)
    runtime = TorchRuntime(weights, artifact.context)
    runtime.name = "gguf, its weights read by gguf-py, in torch"
    return runtime
