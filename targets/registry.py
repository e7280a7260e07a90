"""Targets by name."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import cast

from bluelm.errors import InputError
from export.formats import Without, function, record, records
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
    chip = find_soc(soc or row.soc, row.vendor)
    backend = _for_chip(_with_cache(_backend(chosen), chosen, kv_bits), chip)
    if activation_bits is not None and not backend.needs_ranges:
        backend = _with_floats(backend, chosen, activation_bits)
    return Target(name, chip, chosen, backend, device_ram_gb)


def runtimes_of(name: str) -> tuple[str, ...]:
    """The runtimes of a target, its default first."""
    row: TargetRow = table().targets[name]
    others = [kind.name for kind in records().values() if name in kind.targets and kind.name != row.runtime]
    return (row.runtime, *others)


def _backend(runtime: str) -> Backend:
    path = record(runtime).backend
    assert not isinstance(path, Without), f"{runtime}: {path}"
    return function(path)()


def _for_chip(backend: Backend, chip: Soc) -> Backend:
    """A backend that lowers for one chip has a field `soc`."""
    if is_dataclass(backend) and any(field.name == "soc" for field in fields(backend)):
        return cast(Backend, replace(backend, soc=chip))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return backend


def _with_cache(backend: Backend, runtime: str, kv_bits: int | None) -> Backend:
    if kv_bits is None:
        return backend
    widths: tuple[int, ...] = getattr(backend, "kv_widths", ())
    if kv_bits not in widths:
        fix = f"it takes {', '.join(map(str, widths))}" if widths else "leave --kv-bits away"
        raise InputError(f"the runtime {runtime} has no choice of a {kv_bits}-bit KV cache", fix=fix)
    assert is_dataclass(backend) and not isinstance(backend, type)
    return cast(Backend, replace(backend, kv_bits=kv_bits))


def _with_floats(backend: Backend, runtime: str, bits: int) -> Backend:
    """A backend whose activations are floats of a chosen width has a field `activations`."""
    if not hasattr(backend, "activations"):
        fix = "leave --activation-bits away; NPUs' integers and Core ML's floats have a choice"
        raise InputError(f"the runtime {runtime} has no choice of {bits}-bit activations", fix=fix)
    if bits not in (16, 32):
        raise InputError(f"the runtime {runtime} has no {bits}-bit activations", fix="it takes 16 or 32")
    assert is_dataclass(backend) and not isinstance(backend, type)
    return cast(Backend, replace(backend, activations=f"float{bits}"))


def _chip_named(name: str) -> Soc | None:
    return next((soc for soc in table().socs if soc.answers_to(name)), None)
