"""Speed without a device: bytes moved and operations per token, over what published figures say is reached.

    seconds per decoded token  = (a * bytes / bandwidth + o * blocks) * exp(soc + runtime + model)
    seconds per prefilled token = (c * operations + o * blocks) * exp(soc + runtime + model)

`a` (how much of the peak bandwidth is lost), `c` and `o` (cost of starting a block) are one number each for a
runtime class; soc, runtime and model are pooled effects, 0 where nothing was published. `eval/speed/speed_fit.py`
fits them on `data/published_speed.csv`; what it found lies in `data/speed_coefficients.json`, together with
the errors on rows left out, which make the interval. This module reads that file and needs neither NumPy nor
a checkpoint.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from bluelm.errors import InputError, UnavailableError
from eval.measurement import Measurement

DATA = Path(__file__).parents[1] / "data"
BLUELM = ("BlueLM-1B", "BlueLM-3B", "BlueLM-7B", "BlueLM-13B")
RuntimeClass = Literal["npu", "npu-fp16", "cpu", "gpu", "ane"]
Phase = Literal["decode", "prefill"]
COVERAGE = 0.8
SMALLEST = 0.5e9  # parameters; of smaller models next to no speeds are published, and what is extrapolated is far off


@dataclass(frozen=True)
class DecoderSizes:
    """What of a decoder decides its work: sizes as in config.json."""

    model: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def body_weights(self) -> int:
        """Weights of all blocks' linear layers: each is read once a token."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the output head: read once a token (of the embedding, only one row is)."""
        return self.hidden * self.vocab


@dataclass(frozen=True)
class TokenCost:
    """What one decoded token costs: bytes read, arithmetic operations, blocks started."""

    weight_bytes: float
    cache_bytes: float
    operations: float
    layers: int


@dataclass(frozen=True)
class Interval:
    """A figure and the interval that holds 80 % of such figures."""

    low: float
    value: float
    high: float


def work(
    shape: DecoderSizes,
    bits: float,
    *,
    context: float,
    cache_element_bytes: float,
    head_bits: float = 8,
    group_size: int = 64,
) -> TokenCost:
    """Work of one decoded token with weights of `bits` (a float16 scale a group) and `context` rows of cache.

    Bytes: each weight once, keys and values of `context` positions once. Operations: two a weight, and
    four a cached element of every query head.
    """
    scale_bits = 16 / group_size
    weights = shape.body_weights * (bits + scale_bits) + shape.head_weights * (head_bits + scale_bits)
    cached = 2 * shape.layers * shape.kv_heads * shape.head_dim * context
    attended = 4 * shape.layers * shape.heads * shape.head_dim * context
    operations = 2 * (shape.body_weights + shape.head_weights) + attended
    return TokenCost(weights / 8, cached * cache_element_bytes, operations, shape.layers)


def default_work(shape: DecoderSizes, bits: float, runtime_class: RuntimeClass, context: float) -> TokenCost:
    """`work` with the cache as the runtime class keeps it: 8 bits on the Hexagon, 16 elsewhere."""
    return work(shape, bits, context=context, cache_element_bytes=1 if runtime_class == "npu" else 2)


@dataclass(frozen=True)
class ChipSpeed:
    """What the estimate knows of a chip; bandwidths in GB/s. `model` is its other name, e.g. "SM8650"."""

    name: str
    dram_gb_s: float
    neural_engine_gb_s: float | None
    note: str
    model: str = ""
    in_device_table: bool = False

    def bandwidth(self, runtime_class: RuntimeClass) -> float:
        """Bytes/s that the runtime class can reach at best."""
        if runtime_class == "ane" and self.neural_engine_gb_s is not None:
            return self.neural_engine_gb_s * 1e9
        return self.dram_gb_s * 1e9


@cache
def shapes() -> Mapping[str, DecoderSizes]:
    """Shapes by model name (`data/model_shapes.csv`)."""
    sizes = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")
    with (DATA / "model_shapes.csv").open(encoding="utf-8", newline="") as file:
        return {r["model"]: DecoderSizes(r["model"], *(int(r[s]) for s in sizes)) for r in csv.DictReader(file)}


@cache
def socs() -> Mapping[str, ChipSpeed]:
    """Chips by name, those that published figures are of among them (`data/soc_memory.csv`)."""
    with (DATA / "soc_memory.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        r["soc"]: ChipSpeed(
            r["soc"],
            float(r["dram_gb_s"]),
            float(r["neural_engine_gb_s"]) if r["neural_engine_gb_s"] else None,
            r["note"],
            r["model"],
            bool(r["device_table"]),
        )
        for r in rows
    }


def find_soc(name: str) -> ChipSpeed:
    """A chip by name or model, case, spaces and hyphens aside; also one of `targets/data/socs.yaml` alone.

    Raises:
        InputError: in neither table; the known ones are listed.
    """
    wanted = _plain(name)
    for soc in socs().values():
        if wanted in (_plain(soc.name), _plain(soc.model)):
            return soc
    from targets.socs import table  # YAML, which chips of published figures do without

    for row in table().socs:
        if row.dram_gb_s is not None and wanted in map(_plain, (row.name, row.id, *row.aliases)):
            return ChipSpeed(row.name, row.dram_gb_s, None, "the table of chips", row.id)
    known = ", ".join(socs())
    raise InputError(f"no memory bandwidth is known for {name!r}", fix=f"name one of: {known}")


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "") or "?"


def find_shape(name: str) -> DecoderSizes:
    """A model by name, case aside.

    Raises:
        InputError: not in the table; the known ones are listed.
    """
    for shape in shapes().values():
        if shape.model.lower() == name.lower():
            return shape
    raise InputError(f"no shape is known for {name!r}", fix=f"name one of: {', '.join(shapes())}")


@cache
def coefficients() -> dict:
    """What `data/speed_coefficients.json` holds."""
    return json.loads((DATA / "speed_coefficients.json").read_text(encoding="utf-8"))


def seconds_per_token(fit: Mapping, phase: Phase, bandwidth: float, load: TokenCost) -> float:
    """The formula before the effects; `fit` holds "rate" and "block" of one runtime class."""
    if phase == "decode":
        return fit["rate"] * (load.weight_bytes + load.cache_bytes) / bandwidth + fit["block"] * load.layers
    return fit["rate"] * load.operations + fit["block"] * load.layers


def estimate(
    phase: Phase, load: TokenCost, soc: ChipSpeed, runtime_class: RuntimeClass, *, runtime: str = "", model: str = ""
) -> Interval:
    """Tokens/s of one phase with the interval that held 80 % of the rows left out in the same way.

    A row left out "in the same way" shared as little with the rows fitted as this question does: its model
    left out always, its chip too where nothing is published for this one's, its runtime too unless two sources or
    more published figures of this one's.

    Raises:
        UnavailableError: nothing published for this runtime class and phase.
    """
    classes = coefficients()[phase]
    if runtime_class not in classes:
        known = ", ".join(classes)
        raise UnavailableError(
            f"nothing is published that a {phase} speed on {runtime_class!r} could be estimated from",
            fix=f"estimate one of: {known}; or measure on a device",
        )
    fit = classes[runtime_class]
    effects = fit["effects"]
    known = (("soc", soc.name), ("runtime", runtime), ("model", model))
    shift = sum(effects[kind].get(name, 0.0) for kind, name in known)
    seconds = seconds_per_token(fit, phase, soc.bandwidth(runtime_class), load) * math.exp(shift)
    width = fit["half_width"][unknown(soc.name in effects["soc"], runtime in fit["confirmed"])]
    return Interval(math.exp(-width) / seconds, 1 / seconds, math.exp(width) / seconds)


def unknown(soc_known: bool, runtime_known: bool) -> str:
    """Name of the way of leaving out that matches what is not known."""
    return "model" + ("" if soc_known else "+soc") + ("" if runtime_known else "+runtime")


def as_measurement(phase: Phase, interval: Interval, note: str = "", subject: str = "soc") -> Measurement:
    """The estimate as a figure that a budget can judge.

    The error is one standard error as if the interval were normal in the logarithm (80 % = 1.2816 of them
    to each side); the interval itself is in the note.
    """
    spread = math.log(interval.high / interval.low) / (2 * 1.2816)
    text = f"80 % interval {interval.low:.3g} to {interval.high:.3g} tokens/s, from published figures"
    return Measurement(
        f"{phase}_tokens_per_s",
        interval.value,
        "tokens/s",
        "estimated",
        error=interval.value * spread,
        note=f"{text}; {note}" if note else text,
        subject=subject,
        low=interval.low,
        high=interval.high,
        by="a model of published speeds",
    )
