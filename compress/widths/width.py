"""The width of one weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Widths:
    """Bits and groups of one weight."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def note(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
