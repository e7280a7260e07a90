"""Graphs that Qualcomm compiled, read back."""

from __future__ import annotations

from collections.abc import Mapping

from compress.store import QuantizedCheckpoint
from export import htp_reader
from export.artifact import Artifact
from export.readback.held import listed, table_faults
from export.readback.items import linear_names

COPIES: Mapping[str, Mapping[str, int]] = {
    "qnn-context": {"context": 1, "simulator-context": 2},
    "executorch-qnn": {"model": 2},
}
"""Of formats with compiled graphs: the files' roles, and how often they hold each weight, all files together."""


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> tuple[list[str], list[str]]:
    """Wrong weights, and what the files do not tell."""
    names = linear_names(quantized)
    answers: list[htp_reader.Answer] = []
    for role, copies in COPIES[artifact.format].items():
        weights = ((name, quantized.ordered(name).weight) for name in names)  # one at a time
        answers.append(htp_reader.compare(artifact.paths(role), weights, copies))
    wrong = [name for name in names if any(name in answer.wrong for answer in answers)]
    missing = [name for name in names if any(name in answer.unread for answer in answers)]
    folded = [name for name in names if any(name in answer.folded for answer in answers)]
    untold: list[str] = []
    if missing:
        untold.append(f"codes and scales of {listed(missing)}: how they lie in the compiled file is not known")
    if folded:
        untold.append(f"scales of {listed(folded)}: of rows of 8 bits, they are part of other compiled numbers")
    return [*wrong, *table_faults(artifact, quantized)], untold
