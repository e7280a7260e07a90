"""Targets by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bluelm.errors import InputError
from export.formats import Numbers, Record, Without, function, record, records
from targets.backend import Backend
from targets.socs import Soc, TargetRow, find_soc, table
from targets.target import Target


def targets() -> tuple[Target, ...]:
    """Every target with its default chip and runtime."""
    return tuple(find(name) for name in table().targets)


def find(
    name: str,
    soc: str | None = None,
    runtime: str | None = None,
    *,
    kv_bits: int | None = None,
    activation_bits: int | None = None,
    device_ram_gb: float | None = None,
) -> Target:
    """A target by its name, or by the id or alias of one of its chips.

    Args:
        kv_bits: width of the KV cache's numbers; None: the runtime's own.
        activation_bits: 16 or 32 for Core ML's floats; integers of NPUs are the ranges' concern.
        device_ram_gb: RAM that phones must make do with; `Target.check` holds the model against it.

    Raises:
        InputError: unknown target, chip, runtime or width; the known ones are listed.
    """
    rows = table().targets
    if name not in rows:
        chip = _chip_named(name)
        owner = next((key for key, row in rows.items() if chip and row.vendor == chip.vendor), None)
        if chip is None or owner is None:
            raise InputError(f"unknown target {name!r}", fix=f"known targets: {', '.join(rows)}")
        soc = soc or chip.id
        return find(owner, soc, runtime, kv_bits=kv_bits, activation_bits=activation_bits, device_ram_gb=device_ram_gb)
    row = rows[name]
    chosen, offered = runtime or row.runtime, runtimes_of(name)
    if chosen not in offered:
        raise InputError(f"the target {name} has no runtime {chosen!r}", fix=f"its runtimes: {', '.join(offered)}")
    chip, known = find_soc(soc or row.soc, row.vendor), record(chosen)
    cache = _width("--kv-bits", "KV cache", chosen, known.cache_widths, kv_bits)
    made = Target(name, chip, chosen, _backend(known), cache, device_ram_gb=device_ram_gb)
    if made.needs_ranges:
        return made
    return replace(
        made, float_bits=_width("--activation-bits", "activations", chosen, known.float_widths, activation_bits)
    )


def runtimes_of(name: str) -> tuple[str, ...]:
    """The runtimes of a target, its default first."""
    row: TargetRow = table().targets[name]
    others = [kind.name for kind in records().values() if name in kind.targets and kind.name != row.runtime]
    return (row.runtime, *others)


def _backend(known: Record) -> Backend:
    assert not isinstance(known.backend, Without), f"{known.name}: {known.backend}"
    return function(known.backend)()


def _width(option: str, what: str, runtime: str, widths: Sequence[Numbers], bits: int | None) -> Numbers:
    """The chosen one, or the default."""
    if bits is None:
        return widths[0] if widths else 16
    for width in widths if len(widths) > 1 else ():
        if width == bits:
            return width
    fix = f"use {', '.join(map(str, widths))}" if len(widths) > 1 else f"omit {option}"
    raise InputError(f"the runtime {runtime} does not support {option} {bits} ({what})", fix=fix)


def _chip_named(name: str) -> Soc | None:
    return next((soc for soc in table().socs if soc.answers_to(name)), None)
