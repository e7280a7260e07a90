"""Instructions a token under qemu: repeats, and what a change of the artifact does to them.

`python benchmarks/instructions.py WORK` quantizes the demo checkpoint into the folder WORK (round to nearest, 4 bit),
exports it twice and counts. Writes benchmarks/instructions.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bluelm.checkpoint import Checkpoint
from bluelm.files import demo_checkpoint, write_text
from calibration.samples import load_samples
from compress.engine import quantize
from compress.recipe import Recipe
from eval.emulated import TOLERANCE
from export import onnx_cpu
from targets.qemu_count import Counts, count

REPEATS = 3


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
    lines, first = [], None
    for name, artifact, depth, repeats in cases:
        for turn in range(repeats):
            found = count(artifact, depth)
            first = first or found
            lines.append(_line(f"{name}, repeat {turn + 1}", found, first))
            print(lines[-1], end="", flush=True)
    assert first is not None
    write_text(Path(__file__).with_suffix(".md"), _text(lines, first))


def _line(name: str, found: Counts, first: Counts) -> str:
    cells = [f"{v:,.0f} ({v / b - 1:+.3%})" for v, b in zip(_both(found), _both(first), strict=True)]
    return f"| {name} | {cells[0]} | {cells[1]} | {found.relative_error:.1e} |\n"


def _both(counts: Counts) -> tuple[float, float]:
    return counts.prefill, counts.decode


def _text(lines: list[str], first: Counts) -> str:
    load = os.getloadavg()[0]
    return (
        "# Instructions a token under qemu\n\n"
        "`python benchmarks/instructions.py WORK`: the demo model, 4 bit in groups of 32, context 512, chunk 128.\n"
        f"{first.tools}. Load of the machine meanwhile: {load:.1f} on {os.cpu_count()} cores: a clock would have\n"
        "told nothing. In brackets: change against the first line. The last column is the emulated\n"
        "logits' relative error against this machine's: the same artifact ran.\n\n"
        "| what | prefill | decode | logits differ by |\n|---|---|---|---|\n"
        + "".join(lines)
        + f"\nThe gate (`bluelm-export count`) allows {TOLERANCE:.1%} more than the last accepted run, several times\n"
        "what repeats differ by. Behind more tokens decode costs the same: the graphs are static and go over\n"
        "the whole context.\n"
    )


if __name__ == "__main__":
    main()
