"""Names of files and folders in a run's folder."""

from __future__ import annotations

from export.formats import record

WIDTHS = "widths"  # with --bits auto: the width of every linear, and the recipe that it comes to
QUANTIZED = "quantized"  # codes, scales, zero points: what every exporter reads
RANGES = "ranges"  # of activations, for runtimes with integer activations
ONNX_CPU = "onnx-cpu"  # runs anywhere
COMPILED = "compiled"  # the vendor's binary for one chip
JUDGED = "judged"  # figures on held-out text
TASKS = "tasks"  # scores in tasks of lm-evaluation-harness
LOG = "log.txt"


def lowered(runtime: str) -> str:
    """Folder of what the vendor's compiler takes: `onnx-npu` for Snapdragons, else named as the runtime."""
    return record(runtime).lowered_as
