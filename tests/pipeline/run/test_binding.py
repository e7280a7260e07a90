"""Whether a report belongs to the artifact beside it, also one that an earlier version wrote."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from eval.report import Report
from pipeline.run.binding import other_than_judged
from tests.support.checkpoints import lowered


@pytest.fixture(scope="module")
def folder() -> Path:
    return lowered.cpu().folder


def report(folder: Path, **changed: Any) -> Report:
    """What a run notes of the artifact; None takes a field away."""
    told = lowered.cpu().model_dump(mode="json") | changed
    told = {name: value for name, value in told.items() if value is not None}
    built = SimpleNamespace(folder=folder.name, on="cpu")
    return cast(Report, SimpleNamespace(artifacts={"cpu": built}, details={"artifacts": {"cpu": told}}))


def test_a_report_from_before_a_field_was_there_still_belongs_to_it(folder: Path) -> None:
    assert other_than_judged(folder.parent, report(folder), "cpu") == ""
    assert other_than_judged(folder.parent, report(folder, notes=None, nodes=None), "cpu") == ""


@pytest.mark.parametrize(
    "changed", [{"context": 64}, {"quantized_digest": "0" * 64}, {"format": None}, {"unheard": 1}, {"files": []}]
)
def test_a_report_of_another_artifact_does_not(folder: Path, changed: dict[str, Any]) -> None:
    assert "artifact.json is another" in other_than_judged(folder.parent, report(folder, **changed), "cpu")
