"""Fits `eval/speed/speed_model.py` on published figures, and says how far off it is on rows not seen."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.speed.speed_model import (
    COVERAGE,
    DATA,
    ChipSpeed,
    Phase,
    RuntimeClass,
    TokenCost,
    default_work,
    seconds_per_token,
    shapes,
    socs,
    unknown,
)

KINDS = ("soc", "runtime", "model")
SHRINK = 1.0  # an effect seen n times counts n / (n + SHRINK) of its median
FEW = 20  # a class with fewer rows borrows its interval from all such classes
EVIDENCE = ("vendor-measured", "project-measured")


@dataclass(frozen=True)
class Published:
    """One published figure with the work that it stands for."""

    number: int
    runtime_class: RuntimeClass
    soc: ChipSpeed
    runtime: str
    model: str
    bits: float
    parameters_b: float
    load: TokenCost
    tokens_s: float
    source: str = ""
    """Repository or page that published it."""

    def effect(self, kind: str) -> str:
        return self.soc.name if kind == "soc" else getattr(self, kind)


def runtime_class(backend: str, model: str) -> RuntimeClass:
    """Class of a published row. An empty backend is the CPU: sources say so or the phone leaves no other."""
    if "HTP" in backend:
        return "npu-fp16" if "fp16 act" in model else "npu"
    if "ANE" in backend:
        return "ane"
    gpu = backend in ("Metal", "GPU") or "Vulkan" in backend or "OpenCL" in backend
    return "gpu" if gpu else "cpu"


def published(phase: Phase, path: Path = DATA / "published_speed.csv") -> list[Published]:
    """Rows that a vendor or a project measured: 3.7 to 8 bits, at most 9 B, shape and chip known."""
    patterns = _patterns()
    found = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            parsed = _parse(phase, number, row, patterns)
            if parsed is not None:
                found.append(parsed)
    return found


def _patterns() -> list[tuple[str, str]]:
    with (DATA / "model_shapes.csv").open(encoding="utf-8", newline="") as file:
        return [(row["pattern"], row["model"]) for row in csv.DictReader(file)]


def _number(text: str) -> float | None:
    return float(text) if text else None


def _parse(phase: Phase, number: int, row: Mapping[str, str], patterns: list[tuple[str, str]]) -> Published | None:
    evidence = row["note"].partition("]")[0].lstrip("[")
    bits, parameters = _number(row["weight_bits"]), _number(row["params_b"])
    rate = _number(row["decode_tok_s"]) if phase == "decode" else _prefill_rate(row)
    if evidence not in EVIDENCE or rate is None or bits is None or parameters is None:
        return None
    model = next((name for pattern, name in patterns if re.match(pattern, row["model"].lower())), None)
    soc = socs().get(row["soc"])
    if model is None or soc is None or not 3.5 <= bits <= 8 or parameters > 9:
        return None
    kind = runtime_class(row["backend"], row["model"])
    # Qualcomm's graphs are static: every decode step reads the whole context's cache.
    static = kind.startswith("npu") and _number(row["context"])
    read = _number(row["context"]) if static else _number(row["prompt_tokens"])
    load = default_work(shapes()[model], bits, kind, read or 128)
    runtime = "QNN" if row["runtime"] in ("Genie / QNN", "QNN context binary") else row["runtime"]
    return Published(number, kind, soc, runtime, model, bits, parameters, load, rate, row["source_repo_or_page"])


def _prefill_rate(row: Mapping[str, str]) -> float | None:
    """Published prefill rate, or the time to the first token of a prompt of known length turned into one.

    Where both are given and disagree by more than two, the first is kept: it excludes loading.
    """
    rate, first, prompt = (_number(row[k]) for k in ("prefill_tok_s", "ttft_s", "prompt_tokens"))
    if rate is not None:
        return rate
    return prompt / first if first and prompt else None


def fit_class(phase: Phase, rows: Sequence[Published]) -> dict:
    """Two coefficients and pooled effects of one runtime class, in turns, on the logarithm of the time.

    Coefficients: Gauss-Newton on the logarithm of each, so that they stay positive, with Huber's weights
    (0.15) against figures that are off for reasons of their own. Effects: medians of what is left, shrunk.
    With one model only, the cost of a block cannot be told from the cost of its bytes and is left out.
    """
    times = np.array([1 / row.tokens_s for row in rows])
    columns = _columns(phase, rows)
    coefficients: np.ndarray | None = None
    effects: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in KINDS}
    for _ in range(6):
        shift = np.array([sum(effects[k][r.effect(k)] for k in KINDS) for r in rows])
        coefficients = _positive_fit(columns, np.log(times) - shift, coefficients)
        left = np.log(times) - np.log(columns @ coefficients)
        for kind in KINDS:
            others = [k for k in KINDS if k != kind]
            rest = left - np.array([sum(effects[k][r.effect(k)] for k in others) for r in rows])
            effects[kind] = defaultdict(float, _pooled(rows, kind, rest))
    assert coefficients is not None
    rate, block = (*coefficients.tolist(), 0.0)[:2]
    return {"rate": rate, "block": block, "effects": {k: dict(v) for k, v in effects.items()}}


def _columns(phase: Phase, rows: Sequence[Published]) -> np.ndarray:
    unit = {"rate": 1.0, "block": 0.0}
    rate = [seconds_per_token(unit, phase, r.soc.bandwidth(r.runtime_class), r.load) for r in rows]
    block = [float(r.load.layers) for r in rows]
    several = len({row.model for row in rows}) > 2
    return np.array([rate, block]).T if several else np.array([rate]).T


def _positive_fit(columns: np.ndarray, target: np.ndarray, start: np.ndarray | None) -> np.ndarray:
    """b >= 0 that minimises Huber's loss of log(columns @ b) - target."""
    count = columns.shape[1]
    first = np.full(count, np.exp(target).mean() / count) / columns.mean(axis=0)
    b = first if start is None else start
    for _ in range(25):
        predicted = columns @ b
        error = np.log(predicted) - target
        weight = np.minimum(1, 0.15 / np.maximum(np.abs(error), 1e-9))
        slope = columns * (b / predicted[:, None])  # d log(predicted) / d log(b)
        curve = slope.T @ (weight[:, None] * slope) + 1e-3 * np.eye(count)
        b = b * np.exp(np.clip(-np.linalg.solve(curve, slope.T @ (weight * error)), -1, 1))
    return b


def _pooled(rows: Sequence[Published], kind: str, left: np.ndarray) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, left, strict=True):
        groups[row.effect(kind)].append(float(value))
    return {name: float(np.median(v)) * len(v) / (len(v) + SHRINK) for name, v in groups.items()}


def log_error(phase: Phase, fit: Mapping, row: Published) -> float:
    """log(estimated / published) tokens/s."""
    shift = sum(fit["effects"][kind].get(row.effect(kind), 0.0) for kind in KINDS)
    seconds = seconds_per_token(fit, phase, row.soc.bandwidth(row.runtime_class), row.load) * math.exp(shift)
    return -math.log(seconds * row.tokens_s)


Leave = Callable[[Published, Published], bool]


def leaves(kinds: Iterable[str]) -> Leave:
    """Leave out each row that shares any of `kinds` with the row in question."""
    chosen = tuple(kinds)
    return lambda row, other: any(row.effect(kind) == other.effect(kind) for kind in chosen)


def twin(row: Published, other: Published) -> bool:
    """The row itself and its twins: other figures of the same model on the same chip."""
    return row.model == other.model and row.soc == other.soc


def left_out(phase: Phase, rows: Sequence[Published], leave: Leave) -> dict[int, float]:
    """Log error of each row under a fit that has not seen it (nor what `leave` says goes with it).

    A row whose class has nothing left to fit on is missing.
    """
    errors: dict[int, float] = {}
    fits: dict[tuple, dict] = {}
    for row in rows:
        rest = [r for r in rows if r.runtime_class == row.runtime_class and not leave(row, r)]
        if not rest:
            continue
        key = tuple(r.number for r in rest)
        if key not in fits:
            fits[key] = fit_class(phase, rest)
        errors[row.number] = log_error(phase, fits[key], row)
    return errors


def half_width(errors: Sequence[float], coverage: float = COVERAGE) -> float:
    """Half-width in the logarithm that holds `coverage` of new errors (split-conformal order statistic)."""
    ordered = sorted(abs(e) for e in errors)
    rank = math.ceil(coverage * (len(ordered) + 1))
    return ordered[min(rank, len(ordered)) - 1]


def widths(rows: Sequence[Published], errors: Mapping[int, float]) -> dict[str, float]:
    """Half-width by runtime class; classes with few rows share one."""
    by_class: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.number in errors:
            by_class[row.runtime_class].append(errors[row.number])
    few = list(itertools.chain.from_iterable(v for v in by_class.values() if len(v) < FEW))
    every = list(itertools.chain.from_iterable(by_class.values()))
    shared = half_width(few if len(few) >= FEW else every)
    classes = {row.runtime_class for row in rows}
    return {c: half_width(by_class[c]) if len(by_class[c]) >= FEW else shared for c in classes}


def inside(rows: Sequence[Published], errors: Mapping[int, float], leave: Leave) -> dict[int, bool]:
    """Whether each row lies in the interval that the *other* rows' errors make."""
    result = {}
    for row in rows:
        if row.number in errors:
            others = {r.number: errors[r.number] for r in rows if r.number in errors and not leave(row, r)}
            width = widths([r for r in rows if r.number in others], others).get(row.runtime_class)
            result[row.number] = width is not None and abs(errors[row.number]) <= width
    return result


def fit_all() -> dict:
    """Everything that `speed_coefficients.json` holds."""
    result: dict = {}
    phases: tuple[Phase, ...] = ("decode", "prefill")
    for phase in phases:
        rows = published(phase)
        classes = sorted({row.runtime_class for row in rows})
        result[phase] = {c: fit_class(phase, [r for r in rows if r.runtime_class == c]) for c in classes}
        by_unknown = _widths_by_unknown(phase, rows)
        for c in classes:
            result[phase][c]["half_width"] = {name: found[c] for name, found in by_unknown.items()}
            result[phase][c]["confirmed"] = confirmed([r for r in rows if r.runtime_class == c])
            result[phase][c]["rows"] = sum(r.runtime_class == c for r in rows)
    return rounded(result)


def confirmed(rows: Sequence[Published]) -> list[str]:
    """Runtimes that more than one source published figures of.

    What one source alone says of a runtime cannot be told from that source's own phones, prompts and versions: the
    next figure of the same runtime is as far off as one of a runtime never seen.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        sources[row.runtime].add(row.source)
    return sorted(name for name, found in sources.items() if len(found) > 1)


def _widths_by_unknown(phase: Phase, rows: Sequence[Published]) -> dict[str, dict[str, float]]:
    """Half-widths by what is not known; knowing less never makes an interval narrower."""
    found: dict[str, dict[str, float]] = {}
    for soc_known, runtime_known in itertools.product((True, False), repeat=2):
        name = unknown(soc_known, runtime_known)
        own = widths(rows, left_out(phase, rows, leaves(name.split("+"))))
        less = [w for other, w in found.items() if set(other.split("+")) < set(name.split("+"))]
        found[name] = {c: max(own[c], *(w[c] for w in less)) if less else own[c] for c in own}
    return found


def rounded(value: Any) -> Any:
    """Floats to 6 significant digits, keys in order: the file does not depend on the machine's last bit."""
    if isinstance(value, dict):
        return {key: rounded(value[key]) for key in sorted(value)}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def dumps(coefficients: Mapping) -> str:
    return json.dumps(coefficients, indent=1, ensure_ascii=False) + "\n"
