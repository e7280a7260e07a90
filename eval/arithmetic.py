"""What a format's arithmetic may cost: the KL of an artifact to its own weights in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import yaml

from export.artifact import Artifact

EXPECTED = Path(__file__).parent / "data" / "runtime_kl.yaml"
LEVELS = ("onnx-cpu", "onnx-genai")
"""Formats whose linears say whether they round activations to 8 bits."""


def expected_runtime_kl(artifact: Artifact) -> float | None:
    """The most that the artifact may cost on average over a range of positions, in nats a token; None where nobody
    knows: what its linears compute in, and what its KV cache is rounded to.
    """
    table = _table()
    kind = table["formats"].get(artifact.format)
    if kind is None:
        return None
    if artifact.format in LEVELS and _rounds_activations(artifact):
        kind = "8-bit activations"
    return table["linears"][kind] + table["caches"].get(artifact.cache, 0.0)


def _rounds_activations(artifact: Artifact) -> bool:
    """Whether a linear of an ONNX artifact has accuracy level 4."""
    paths = artifact.paths("prefill") or artifact.paths("model")
    nodes = (node for path in paths for node in onnx.load(path, load_external_data=False).graph.node)
    return any(a.name == "accuracy_level" and a.i == 4 for node in nodes for a in node.attribute)


@cache
def _table() -> dict:
    return yaml.safe_load(EXPECTED.read_text(encoding="utf-8"))
