"""Every damage that the gate must find, as rows: `benchmarks/gate/command.py` does each on each of its runtimes.

A new one is a row in the module of its kind; tests do those of onnx-cpu and onnx-genai.
"""

from __future__ import annotations

from tests.support.damages import files, graphs, metadata, positions, qualcomm, runners, weights
from tests.support.damages.record import ALL, COMPILED, Bench, Damage, copied, damaged, judged_as, sound

__all__ = ["ALL", "COMPILED", "DAMAGES", "Bench", "Damage", "copied", "damaged", "judged_as", "sound"]

DAMAGES: tuple[Damage, ...] = (
    *weights.ROWS, *positions.ROWS, *metadata.ROWS, *runners.ROWS, *files.ROWS, *graphs.ROWS, *qualcomm.ROWS,
)  # fmt: skip
