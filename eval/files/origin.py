"""What produced a figure: the runtime that ships, or a stand-in, which makes the figure emulated."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from eval.measurement import How, Measurement
from export.artifacts.artifact import Artifact
from targets.runtime import Place, run_of

OVERFLOWS = {  # by an artifact's note or the type of its cache: what to do where its numbers run out of range
    "float16 activations": "beyond float16's 65,504? Export with --activation-bits 32, which computes in float32",
    "float16": "beyond float16's 65,504? Export with --kv-bits 32, a cache in float32",
}
# counts, and figures of the float model
NOT_THE_ARTIFACT = ("tokens_judged", "documents_judged", "reference_perplexity", "task_reference")


@dataclass(frozen=True)
class Answered:
    """How figures of an artifact that ran were got, and by what: `Measurement.how` and `.by`.

    Attributes:
        remedy: what helps where it answers with no numbers; "" where nobody knows.
    """

    how: How
    by: str
    remedy: str = ""

    def mark(self, figures: Iterable[Measurement]) -> list[Measurement]:
        """The figures with their origin; those that are not the artifact's stay as they are."""
        return [m if m.name.partition("@")[0] in NOT_THE_ARTIFACT else self._marked(m) for m in figures]

    def _marked(self, m: Measurement) -> Measurement:
        help_needed = self.remedy and not math.isfinite(m.value)
        note = "; ".join(text for text in (m.note, self.remedy) if text) if help_needed else m.note
        return replace(m, how=self.how, by=self.by, note=note)


def origin(artifact: Artifact, on: Place) -> Answered:
    """The origin of figures from an artifact that `open_runtime(artifact.folder, on)` runs."""
    remedy = next((fix for told, fix in OVERFLOWS.items() if told in (*artifact.notes, artifact.cache)), "")
    run = run_of(artifact, on)
    if run.stands_in:
        return Answered("emulated", f"{run.stands_in}, {_told(run.package)}", remedy)
    unit = "" if on == "cpu" else f" ({on})"
    return Answered("measured", f"{_told(run.package)} on this machine, {platform.machine()}{unit}", remedy)


def _told(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
