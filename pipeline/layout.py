"""What lies where in a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bluelm.errors import InputError

QUANTIZED = "quantized"  # codes, scales, zero points: what every exporter reads
RANGES = "ranges"  # of activations, for runtimes with integer activations
ONNX_CPU = "onnx-cpu"  # runs anywhere
ONNX_NPU = "onnx-npu"  # what the vendor's compiler takes
COMPILED = "compiled"  # the vendor's binary for one chip
JUDGED = "judged"  # figures on held-out text
LOG = "log.txt"


def artifact_folder(run: Path, on: Literal["cpu", "htp"]) -> Path:
    """Folder of the artifact that runs on the host's CPU or on the NPU's simulator.

    Raises:
        InputError: this run made none.
    """
    folder = run / (ONNX_CPU if on == "cpu" else COMPILED)
    if not (folder / "artifact.json").is_file():
        other = "--on cpu" if on == "htp" else "bluelm-export again"
        raise InputError(f"this run has no artifact for {on}", where=folder, fix=f"use {other}")
    return folder
