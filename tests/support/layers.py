"""The packages, each of which may import those before it."""

from __future__ import annotations

LAYERS = ("bluelm", "calibration", "compress", "export", "targets", "eval", "pipeline")
"""Each may import those before it."""
