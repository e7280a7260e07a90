"""Opens a finished run's report only if it belongs to the files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bluelm.errors import InputError
from bluelm.system.files import sha256, write_text
from bluelm.system.reading import read_note
from eval.budget.budget import judge
from eval.budget.limits import Budget
from eval.report import FILE, Report
from export.artifacts.artifact import MANIFEST, Artifact
from pipeline.run.stages import RECORDS

SEAL = "report"  # in the run's records: the digest of its report.json
AGAIN = "bluelm-export evaluate {run} judges what lies there now"


def seal(run: Path) -> None:
    """Note the digest of the report that a run just wrote."""
    write_text(run / RECORDS / SEAL, sha256(run / FILE))


def open_run(run: Path) -> Report:
    """The report of a finished run.

    Raises:
        InputError: no finished run; the report was changed, its verdict does not follow from its figures, or the
            artifacts that lie there are not those that it judged.
    """
    report = Report.open(run)
    noted = run / RECORDS / SEAL
    if noted.exists() and read_note(noted) != sha256(run / FILE):
        raise InputError("report.json was changed after the run", where=run / FILE, fix=_again(run))
    if report.passed:
        _hold_again(report, run)
    for name in report.artifacts:
        other = other_than_judged(run, report, name)
        if other:
            raise InputError(f"the report does not belong to what lies there: {other}", where=run, fix=_again(run))
    return report


def _hold_again(report: Report, run: Path) -> None:
    """InputError unless the report's own figures and limits give the verdict that it tells."""
    try:
        limits = Budget.model_validate(report.budget)
    except ValidationError as error:
        raise InputError("the report's limits cannot be read", where=run / FILE, fix=_again(run)) from error
    again = judge(limits, report.measurements, tuple(report.artifacts), report.samples)
    failed = [str(check) for check in (*again.failures, *(c for c in report.checks if not c.passed))]
    if failed:
        problem = f"the report says passed, its own figures do not: {failed[0]}"
        raise InputError(problem, where=run / FILE, fix=_again(run))


def missing(run: Path, report: Report) -> list[str]:
    """Artifacts of the report whose folders are not beside it, as where CI keeps reports alone."""
    return [name for name, built in report.artifacts.items() if not (run / built.folder / MANIFEST).is_file()]


def other_than_judged(run: Path, report: Report, name: str) -> str:
    """How an artifact of the run differs from the one that was judged, in words; "" if not, or if it is not there."""
    if name in missing(run, report):
        return ""
    folder = run / report.artifacts[name].folder
    told: Mapping[str, Any] = report.details.get("artifacts", {}).get(name, {})
    judged = {str(f.get("path")): f.get("sha256") for f in told.get("files", ()) if isinstance(f, dict)}
    there = Artifact.open(folder)
    if there.model_dump() != _read(told):
        return f"{folder.name}/{MANIFEST} is another"
    for file in there.files:
        if sha256(folder / file.path) != judged.get(file.path):
            return f"{folder.name}/{file.path} was changed"
    return ""


def _read(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a report tells of an artifact; what its version did not write yet is as it is by default."""
    try:
        return Artifact.model_validate_json(json.dumps(told)).model_dump()
    except ValidationError:
        return None


def _again(run: Path) -> str:
    return AGAIN.format(run=run)
