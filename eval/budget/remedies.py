"""What helps where an artifact is too far from the float model: finer weights, or finer arithmetic.

Both parts are measured: the KL divergence to the float model, and that to the artifact's own weights in float32, which
is what the runtime's arithmetic adds (in the range of positions where it adds most). Only the first can be lowered by
bits and methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from eval.measurement import Measurement

ANSWERS = (
    "max_perplexity_ratio", "max_mean_kl", "max_p99_kl", "max_max_kl", "min_top1_agreement", "min_top5_agreement",
)  # fmt: skip
"""Limits that ask how far the artifact's answers are from the float model's, of all text or of a domain."""
SAFE = 0.8  # of a limit on the KL: what to aim an estimate at


def remedy(key: str, limit: float, subject: str, figures: Mapping[tuple[str, str], Measurement]) -> str:
    """A sentence behind a limit that failed; empty where it is no limit on answers, or the parts were not measured.

    Args:
        key: the budget's, with "@domain" behind it for a domain's.
        limit: in the limit's own unit.
        figures: by name and subject.
    """
    kl, own = (figures.get((name, subject)) for name in ("mean_kl", "runtime_kl"))
    if key.partition("@")[0] not in ANSWERS or kl is None or own is None or not kl.value > 0:
        return ""
    parts = f"of {kl.value:.2g} nats a token the runtime's arithmetic costs {own.value:.2g} at most"
    if own.value > kl.value / 2:
        finer = "a recipe that rotates, as presets do, --activation-bits, another --runtime"
        return f"{parts}: finer activations help ({finer}), more bits do not"
    aim = SAFE * _aim(key, limit, kl.value)
    finer = f"more than 4 bits help (--bits auto --max-kl {aim:.1g}, --bits 8)"
    return f"{parts}, the weights the rest: {finer}, and --refine 200"


def _aim(key: str, limit: float, kl: float) -> float:
    """The KL at which a limit would hold, roughly: a ratio of perplexities is about the exponential of it."""
    if key.startswith("max_mean_kl"):
        return limit
    return math.log(limit) if key.startswith("max_perplexity_ratio") and limit > 1 else kl / 4
