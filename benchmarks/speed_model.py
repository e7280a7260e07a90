"""Fits the speed estimate and writes how far off it is: `python benchmarks/speed_model.py`.

Writes eval/data/speed_coefficients.json and benchmarks/speed_model.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bluelm.files import write_text
from eval.speed_fit import Leave, Row, dumps, fit_all, inside, leaves, left_out, published, twin
from eval.speed_model import DATA, Phase, RuntimeClass, default_work, estimate, find_shape, find_soc

WAYS: tuple[tuple[str, Leave], ...] = (
    ("the row and its twins (same model and chip)", twin),
    ("its model", leaves(["model"])),
    ("its chip", leaves(["soc"])),
    ("its model and its chip", leaves(["model", "soc"])),
    ("its runtime", leaves(["runtime"])),
)
ASKED = "4 bit, 0.5 to 8 B"


def asked(row: Row) -> bool:
    """The rows that the goal speaks of."""
    return row.bits == 4 and 0.5 <= row.parameters_b <= 8


def main() -> None:
    write_text(DATA / "speed_coefficients.json", dumps(fit_all()))
    text = [(Path(__file__).parent / "speed_model_head.md").read_text(encoding="utf-8")]
    phases: tuple[Phase, ...] = ("decode", "prefill")
    for phase in phases:
        rows = published(phase)
        text.append(f"\n## {phase.capitalize()}: error on rows left out ({len(rows)} rows fitted)\n\n")
        text.append("| left out | rows judged | n | median | 80 % below | inside 80 % interval | by class |\n")
        text.append("|---|---|---|---|---|---|---|\n")
        for name, leave in WAYS:
            errors = left_out(phase, rows, leave)
            held = inside(rows, errors, leave)
            for label, chosen in (
                (ASKED, [r for r in rows if asked(r)]),
                ("8 bit", [r for r in rows if r.bits == 8]),
            ):
                text.append(f"| {name} | {label} {_line(chosen, errors, held)}")
    text.append(_outside())
    write_text(Path(__file__).with_suffix(".md"), "".join(text))


def _line(rows: Sequence[Row], errors: dict[int, float], held: dict[int, bool]) -> str:
    judged = [r for r in rows if r.number in errors]
    off = {r.number: abs(math.expm1(errors[r.number])) for r in judged}
    by_class = []
    for kind in sorted({r.runtime_class for r in judged}):
        values = [off[r.number] for r in judged if r.runtime_class == kind]
        by_class.append(f"{kind} {np.median(values):.0%} ({len(values)})")
    values = list(off.values())
    share = np.mean([held[r.number] for r in judged])
    return (
        f"| {len(values)} | **{np.median(values):.1%}** | {np.quantile(values, 0.8):.0%} "
        f"| {share:.0%} | {', '.join(by_class)} |\n"
    )


def _outside() -> str:
    """Figures that took no part in the fit: papers and users' reports."""
    cases: tuple[tuple[str, str, str, RuntimeClass, int, float], ...] = (
        (
            "BlueLM-V-3B, Dimensity 9300 NPU (arXiv 2411.10640)",
            "BlueLM-3B",
            "Dimensity 9300",
            "npu",
            2048,
            24.4,
        ),
        (
            "Llama-3.2-3B, 8 Elite Gen 5, Genie (user)",
            "Llama-3.2-3B",
            "Snapdragon 8 Elite Gen 5",
            "npu",
            4096,
            30.0,
        ),
        ("Llama-3.2-3B, 8 Gen 3, Genie (user)", "Llama-3.2-3B", "Snapdragon 8 Gen 3", "npu", 4096, 20.0),
        ("Llama-3.2-1B, M1, MLX (user)", "Llama-3.2-1B", "M1", "gpu", 128, 66.0),
        ("Llama-3.1-8B, M1, MLX (user)", "Llama-3-8B", "M1", "gpu", 128, 12.0),
    )
    lines = ["\n## Figures that took no part\n\n| what | published | estimated, 80 % interval |\n|---|---|---|\n"]
    for title, model, soc, kind, context, figure in cases:
        load = default_work(find_shape(model), 4, kind, context)
        found = estimate("decode", load, find_soc(soc), kind, runtime="QNN" if kind == "npu" else "")
        lines.append(f"| {title} | {figure:g} | {found.value:.1f} ({found.low:.1f} to {found.high:.1f}) |\n")
    return "".join(lines)


if __name__ == "__main__":
    main()
