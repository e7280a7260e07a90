"""Instructions a token under qemu: repeats, and what a change of the artifact does to them.

`python -m benchmarks.speed.instructions WORK` quantizes the demo checkpoint into the folder WORK (round to nearest, 4
bit), exports it twice and counts. Writes results/speed/instructions.json and the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import pages
from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from compress.engine import quantize
from compress.recipe import Recipe
from export.onnx import cpu as onnx_cpu
from targets.emulator.count import Counts, count

REPEATS = 3
COLUMNS = ("what", "prefill", "decode", "logits differ by")


def main() -> None:
    work = Path(sys.argv[1])
    checkpoint = Checkpoint.open(demo_checkpoint())
    recipe = Recipe.load("w4-g32", method="rtn")
    samples = load_samples(None, checkpoint.tokenizer(), 2, 16, 0)
    quantized = quantize(checkpoint, samples, recipe, work / "quantized")
    plain = onnx_cpu.export(quantized, work / "plain", context=512, chunk=128)
    rounded = onnx_cpu.export(quantized, work / "rounded", context=512, chunk=128, accuracy_level=4)
    cases = [("float32 activations, behind 128 tokens", plain, 0, REPEATS)]
    cases += [("the same behind 448 tokens", plain, 448, 1)]
    cases += [("activations rounded to 8 bits (accuracy level 4)", rounded, 0, 1)]
    rows, first = [], None
    for name, artifact, depth, repeats in cases:
        for turn in range(repeats):
            found = count(artifact, depth)
            first = first or found
            rows.append(_row(f"{name}, repeat {turn + 1}", found, first))
            print(rows[-1], flush=True)
    assert first is not None
    pages.save_rows("instructions", "demo", COLUMNS, rows, names=[row[0] for row in rows], tools=first.tools)


def _row(name: str, found: Counts, first: Counts) -> list[str]:
    cells = [f"{v:,.0f} ({v / b - 1:+.3%})" for v, b in zip(_both(found), _both(first), strict=True)]
    return [name, *cells, f"{found.relative_error:.1e}"]


def _both(counts: Counts) -> tuple[float, float]:
    return counts.prefill, counts.decode


if __name__ == "__main__":
    main()
