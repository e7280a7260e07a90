"""What a format's arithmetic may cost: the KL of an artifact to its own weights in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from export.artifacts.artifact import Artifact
from export.formats import Arithmetic
from export.onnx.reader import read_model

EXPECTED = Path(__file__).parents[1] / "data" / "runtime_kl.yaml"


@dataclass(frozen=True)
class Allowance:
    """The most that an artifact may lie apart, in nats a token.

    Attributes:
        range: mean KL to its own weights in float32 over a range of positions.
        single: of one answer to the same. decode: of one answer to what prefill gives there.
    """

    range: float
    single: float
    decode: float

    def __add__(self, other: Allowance) -> Allowance:
        return Allowance(self.range + other.range, self.single + other.single, self.decode + other.decode)


def allowance(artifact: Artifact) -> Allowance:
    """What the artifact's linears compute in, and its KV cache is rounded to, may cost."""
    kind = artifact.record.arithmetic
    if artifact.record.levels and _rounds_activations(artifact):
        kind = "8-bit activations"
    return allowed(kind, artifact.cache)


def allowed(kind: Arithmetic, cache: str) -> Allowance:
    """Of linears that compute in `kind`, over a cache of that type."""
    table = _table()
    found = Allowance(**table["linears"][kind])
    added = table["caches"].get(cache)
    return found if added is None else found + Allowance(**added)


def _rounds_activations(artifact: Artifact) -> bool:
    """Whether a linear of an ONNX artifact has accuracy level 4."""
    paths = artifact.paths("prefill") or artifact.paths("model")
    nodes = (node for path in paths for node in read_model(path).graph.node)
    return any(a.name == "accuracy_level" and a.i == 4 for node in nodes for a in node.attribute)


@cache
def _table() -> dict:
    return yaml.safe_load(EXPECTED.read_text(encoding="utf-8"))
