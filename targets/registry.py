"""Targets by name."""

from __future__ import annotations

from typing import cast, get_args

from bluelm.errors import InputError
from export.artifact import Format
from targets.apple import CoreMLBackend
from targets.arm64 import CpuBackend
from targets.snapdragon import HtpBackend
from targets.socs import Soc, find_soc, table
from targets.target import Backend, Target

BACKENDS: dict[str, Backend] = {"qnn-context": HtpBackend(), "onnx-cpu": CpuBackend(), "coreml": CoreMLBackend()}


def targets() -> tuple[Target, ...]:
    """Every target with its default chip and runtime."""
    return tuple(find(name) for name in table().targets)


def find(name: str, soc: str | None = None, runtime: str | None = None) -> Target:
    """A target by its name, or by the id or alias of one of its chips.

    Raises:
        InputError: unknown target, chip or runtime; the known ones are listed.
    """
    rows = table().targets
    if name not in rows:
        chip = _chip_named(name)
        owner = next((key for key, row in rows.items() if chip and row.vendor == chip.vendor), None)
        if chip is None or owner is None:
            raise InputError(f"unknown target {name!r}", fix=f"known targets: {', '.join(rows)}")
        return find(owner, soc or chip.id, runtime)
    row = rows[name]
    chosen = runtime or row.runtimes[0]
    if chosen not in row.runtimes:
        raise InputError(
            f"the target {name} has no runtime {chosen!r}", fix=f"its runtimes: {', '.join(row.runtimes)}"
        )
    assert chosen in get_args(Format), chosen
    return Target(name, find_soc(soc or row.soc, row.vendor), cast(Format, chosen), BACKENDS[chosen])


def _chip_named(name: str) -> Soc | None:
    return next((soc for soc in table().socs if soc.answers_to(name)), None)
