"""Damage to what Qualcomm's compiler is given and gives: binaries, wrappers, methods."""

from __future__ import annotations

from tests.damages.record import Damage

ROWS: tuple[Damage, ...] = ()
