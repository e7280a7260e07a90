"""Fingerprints of everything that a run's codes depend on, and how two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from compress.recipe import Recipe

PACKAGES = ("bluelm", "calibration", "compress")  # whose code decides the codes


def inputs_of(checkpoint: Checkpoint, recipe: Recipe, tokens: Tensor | None, device: torch.device) -> dict[str, Any]:
    """All that the codes depend on, as plain JSON values: checkpoint, recipe, calibration tokens, this code."""
    read = None if tokens is None else hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
    return {
        "checkpoint": checkpoint.digest(),
        "recipe": recipe.model_dump(mode="json"),
        "calibration": read,
        "code": code(),
        "torch": torch.__version__,
        "device": device.type,
    }


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hex SHA-256 of `inputs_of` a run."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each value in which two runs differ, in words."""
    found = found if isinstance(found, Mapping) else {}  # a damaged record
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{key} ")
        elif old != new:
            yield f"{prefix}{key} was {_short(old)} and is {_short(new)}"


@cache
def code() -> str:
    """Hex SHA-256 over the sources that decide the codes."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _short(value: Any) -> str:
    """A value, a digest by its first letters."""
    text = "none" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
