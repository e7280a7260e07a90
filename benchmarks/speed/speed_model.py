"""Fits the speed estimate and writes how far off it is: `python -m benchmarks.speed.speed_model`.

Writes eval/data/speed_coefficients.json, benchmarks/results/speed/speed_model.json and benchmarks/speed/speed_model.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import pages
from bluelm.system.files import write_text
from eval.speed.speed_fit import (
    Leave,
    Published,
    dumps,
    fit_all,
    half_width,
    inside,
    leaves,
    left_out,
    published,
    rounded,
    twin,
)
from eval.speed.speed_model import DATA, Phase, RuntimeClass, coefficients, default_work, estimate, find_shape, find_soc

WAYS: tuple[tuple[str, Leave], ...] = (
    ("the row and its twins (same model and chip)", twin),
    ("its model", leaves(["model"])),
    ("its chip", leaves(["soc"])),
    ("its model and its chip", leaves(["model", "soc"])),
    ("its runtime", leaves(["runtime"])),
)
ASKED = "4 bit, 0.5 to 8 B"


def asked(row: Published) -> bool:
    """The rows that the goal speaks of."""
    return row.bits == 4 and 0.5 <= row.parameters_b <= 8


def main() -> None:
    write_text(DATA / "speed_coefficients.json", dumps(fit_all()))
    coefficients.cache_clear()
    phases: tuple[Phase, ...] = ("decode", "prefill")
    decode = published("decode")
    found = {
        "phases": {phase: _phase(phase) for phase in phases},
        "kinds": _kinds(decode),
        "sources": [_source(decode, source) for source in _sources(decode)],
        "outside": _outside(),
    }
    found["sources_inside"] = {key: sum(row[key] for row in found["sources"]) for key in ("rows", "before", "inside")}
    pages.save("speed_model", rounded(found))


def _kinds(rows: Sequence[Published]) -> list[dict[str, Any]]:
    """How many rows there are of a class and a width, the fewest first."""
    counts = Counter((row.runtime_class, row.bits) for row in rows)
    ordered = sorted(counts.items(), key=lambda item: (item[1], item[0]))
    return [{"class": kind, "bits": bits, "rows": count} for (kind, bits), count in ordered]


def _phase(phase: Phase) -> dict[str, Any]:
    """Of each way of leaving out: error and coverage."""
    rows = published(phase)
    ways = []
    for name, leave in WAYS:
        errors = left_out(phase, rows, leave)
        held = inside(rows, errors, leave)
        for label, chosen in (
            (ASKED, [r for r in rows if asked(r)]),
            ("8 bit", [r for r in rows if r.bits == 8]),
        ):
            ways.append({"left_out": name, "judged": label, **_error(chosen, errors, held)})
    return {"rows": len(rows), "ways": ways}


def _error(rows: Sequence[Published], errors: dict[int, float], held: dict[int, bool]) -> dict[str, Any]:
    judged = [r for r in rows if r.number in errors]
    off = {r.number: abs(math.expm1(errors[r.number])) for r in judged}
    by_class = {}
    for kind in sorted({r.runtime_class for r in judged}):
        own = [r.number for r in judged if r.runtime_class == kind]
        by_class[kind] = {
            "n": len(own),
            "median": float(np.median([off[n] for n in own])),
            "inside": float(np.mean([held[n] for n in own])),
        }
    values = list(off.values())
    return {
        "n": len(values),
        "median": float(np.median(values)),
        "below_80": float(np.quantile(values, 0.8)),
        "inside": float(np.mean([held[r.number] for r in judged])),
        "by_class": by_class,
    }


def _sources(rows: Sequence[Published]) -> list[str]:
    return sorted({r.source for r in rows if r.runtime_class == "cpu"})


def _source(rows: Sequence[Published], source: str) -> dict[str, Any]:
    """CPU rows of one source, under fits and intervals that saw nothing of the source, nor of the row's model.

    "before": inside the intervals of a known runtime, which the estimate took for these until now.
    """
    cpu = [r for r in rows if r.runtime_class == "cpu"]
    mine = [r for r in cpu if r.source == source]
    others = [r for r in cpu if r.source != source]
    unseen = left_out("decode", cpu, lambda row, other: row.source == other.source or row.model == other.model)
    known = left_out("decode", cpu, leaves(["model"]))
    wide, narrow = (half_width([e[r.number] for r in others if r.number in e]) for e in (unseen, known))
    off = [abs(unseen[r.number]) for r in mine if r.number in unseen]
    return {
        "source": source,
        "rows": len(off),
        "median": float(np.median(np.expm1(off))),
        "before": sum(e <= narrow for e in off),
        "inside": sum(e <= wide for e in off),
    }


def _outside() -> list[dict[str, Any]]:
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
    rows = []
    for title, model, soc, kind, context, figure in cases:
        load = default_work(find_shape(model), 4, kind, context)
        found = estimate("decode", load, find_soc(soc), kind, runtime="QNN" if kind == "npu" else "")
        rows.append({"what": title, "published": figure, "low": found.low, "value": found.value, "high": found.high})
    return rows


if __name__ == "__main__":
    main()
