"""What a format's arithmetic may cost: the KL of an artifact to its own weights in float32.

Where the weights are available, a twin (`eval/accuracy/twins.py`) measures what the arithmetic costs this very model on
this very text, and the artifact may cost a little more. Otherwise limits measured on the demo model apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import yaml

from eval.accuracy import positions
from eval.accuracy.positions import Allowance, PositionPlan, Rows
from eval.accuracy.twins import Twin, rounded_blocks
from export.artifacts.artifact import Artifact
from export.formats import Arithmetic
from targets.host.torch_runtime import TorchRuntime

EXPECTED = Path(__file__).parents[1] / "data" / "runtime_kl.yaml"
RANGE, SINGLE = 2.0, 3.0
"""How many times its twin's cost an artifact may cost: the worst range of positions, the worst answer. Sound artifacts
of the demo and of SmolLM2-135M cost 0.6 to 1.2 and 0.6 to 1.4 times their twins' on every runtime."""


def allowance(artifact: Artifact) -> Allowance:
    """What the artifact's linears compute in, and its KV cache is rounded to, may cost where no twin is at hand."""
    kind = artifact.record.arithmetic
    if artifact.record.levels and rounded_blocks(artifact):
        kind = "8-bit activations"
    return allowed(kind, artifact.cache)


def allowed(kind: Arithmetic, cache: str) -> Allowance:
    """Of linears that compute in `kind`, over a cache of that type."""
    table = _table()
    found = Allowance(**table["linears"][kind])
    added = table["caches"].get(cache)
    return found if added is None else found + Allowance(**added)


def beside_twin(twin: Twin, exact: TorchRuntime, text: Sequence[int], plan: PositionPlan, own: Rows) -> Allowance:
    """What an artifact may cost beside its twin: a small factor, and what float32 itself may.

    Args:
        exact: the artifact's weights in float32. own: its answers to the text at the plan's positions.
    """
    floor = allowed("float32", "float32")
    plain, rounded = twin.pair(exact)
    if rounded is exact:
        return floor
    rows = own if plain is exact else positions.reference(plain, text, [plan])[plan.pieces]
    brief = replace(plan, prompts=(), decodes=())
    found = positions.run(rounded, text, brief, rows)
    cost = positions.worst(found)
    single = SINGLE * cost.single
    return Allowance(RANGE * cost.range, single, single) + floor


@cache
def _table() -> dict:
    return yaml.safe_load(EXPECTED.read_text(encoding="utf-8"))
