"""Collects findings while a program is followed backwards from its outputs to its inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.readback import items
from export.readback.held import faults, stored
from export.readback.numbers import array_fault

BEHIND = "it lies behind the place from which on the operations are others"


class OtherProgramError(Exception):
    """The program does something else here; says what."""


class Trail:
    """Items that were met, with what was wrong."""

    def __init__(self) -> None:
        self._faults: dict[str, list[str]] = {}

    def see(self, item: str, fault: str = "") -> None:
        """The item was met; `fault` says what is wrong, if anything is."""
        faults = self._faults.setdefault(item, [])
        if fault and fault not in faults:
            faults.append(fault)

    def array(self, item: str, found: np.ndarray | None, wanted: np.ndarray) -> None:
        """Type, shape and every bit must be the same."""
        self.see(item, array_fault(found, wanted))

    def weight(self, name: str, found: QuantizedTensor, wanted: QuantizedTensor) -> None:
        """Codes, scales and zero points must be the same."""
        self.see(name, ", ".join(faults(wanted, stored(found))))

    def findings(self, artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
        """Of all that was met; where operations are others, of what lies behind them nothing is known."""
        for item, told in self._faults.items():
            yield from [items.Finding(item, "wrong", fault) for fault in told[:3]] or [items.Finding(item)]
        if self._faults.get(items.GRAPH):
            rest = [item for item in items.inventory(artifact, quantized) if item not in self._faults]
            yield from (items.Finding(item, "untold", BEHIND) for item in rest)
