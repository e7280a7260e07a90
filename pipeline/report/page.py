"""report.html: a run's report as one file that needs nothing else, on a desk's screen and on a phone's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bluelm.system.files import write_text
from bluelm.text.clean import visible
from eval.measurement import Measurement
from eval.report import (
    PLACES,
    SUBJECTS,
    Report,
    cell,
    emulated,
    format_value,
    label,
    number,
    side_by_side,
    task_rows,
    told,
)
from eval.speed.estimate import chip
from export.formats import Without, record
from pipeline.report import page_plots
from pipeline.report.page_plots import Mark
from targets.socs import find_soc

PAGE = "report.html"
TEMPLATES = Path(__file__).parents[1] / "data"
# panels of the first plot: figure, its title, and the budget's key that limits it
ACCURACY = {
    "perplexity_ratio": ("perplexity: artifact / float model", "max_perplexity_ratio"),
    "mean_kl": ("mean KL, nats a token", "max_mean_kl"),
    "p99_kl": ("99th percentile of KL", "max_p99_kl"),
    "top1_agreement": ("top-1 agreement", "min_top1_agreement"),
    "top5_agreement": ("top-5 agreement", "min_top5_agreement"),
}
BY_DOMAIN = ("perplexity_ratio", "mean_kl")
DOMAINS = {"zh": "Chinese", "en": "English", "code": "code", "math": "mathematics"}


@dataclass(frozen=True)
class TextTable:
    """Headings and rows of text; the first column is the row's name, a row's note stands below it."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page: a plot (SVG) and a table, either may be missing; `note` explains them."""

    title: str
    plot: str = ""
    table: TextTable | None = None
    note: str = ""


def write_page(report: Report, folder: Path) -> Path:
    """Write `folder`/report.html, all or nothing."""
    path = folder / PAGE
    write_text(path, render(report))
    return path


def render(report: Report) -> str:
    """The page as HTML. It loads nothing from elsewhere and runs no script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    failed = sum(not check.passed for check in report.checks)
    checks, sound = told(report.checks)
    return environment.get_template("report.html.jinja").render(
        report=report,
        failed=failed,
        checks=sorted(checks, key=lambda check: check.passed),  # what failed comes first
        sound=sound,
        sections=[section for section in _sections(report) if section.plot or section.table],
        facts=list(_facts(report)),
    )


def _sections(report: Report) -> Iterator[Section]:
    yield accuracy(report)
    yield domains(report)
    yield tasks(report)
    yield blocks(report)
    yield size(report)
    yield files(report)
    yield published(report)
    yield speed(report)


def accuracy(report: Report) -> Section:
    """Figures of every artifact with 95 % intervals and the budget's limits; all of them as a table."""
    figures = [m for m in report.measurements if m.subject in SUBJECTS and "@" not in m.name]
    panels: dict[str, list[Mark]] = {}
    limits: dict[str, float] = {}
    for name, (title, key) in ACCURACY.items():
        marks = [Mark.of("", m.subject, m) for m in figures if m.name == name and math.isfinite(m.value)]
        if marks:
            panels[title] = marks
        limit = next((c.limit for c in report.checks if c.name == key), None)
        if marks and limit is not None:
            limits[title] = limit
    plot = page_plots.intervals(panels, limits, _series(report)) if panels else ""
    note = (
        "Dots with their 95 % intervals in the plot; ± one standard error, clustered by window of text, in the table."
    )
    note = _noted(note, report)
    artifacts, rows = side_by_side(report.measurements)
    table = TextTable(("", *artifacts), tuple(rows)) if rows else None
    return Section("Accuracy on held-out text", plot, table, note)


def domains(report: Report) -> Section:
    """Perplexity and KL by domain of the text."""
    found = {(*m.name.partition("@")[::2], m.subject): m for m in report.measurements if m.subject in SUBJECTS}
    keys = [(domain, s) for name, domain, s in found if name == "mean_kl" and domain and not domain.isdigit()]

    def marks(name: str) -> list[Mark]:
        own = [(d, s, found[name, d, s]) for d, s in keys if (name, d, s) in found]
        return [Mark.of(DOMAINS.get(d, d), s, m) for d, s, m in own if _finite(m)]

    panels = {ACCURACY[name][0]: shown for name in BY_DOMAIN if (shown := marks(name))}
    rows = [
        _domain_row(DOMAINS.get(d, d), s, {name: m for (name, at, of), m in found.items() if (at, of) == (d, s)})
        for d, s in keys
    ]
    headings = ("", "ratio", "mean KL", "perplexity", "float model's", "tokens")
    plot = page_plots.intervals(panels, {}, _series(report)) if panels else ""
    return Section("By domain", plot, TextTable(headings, tuple(rows)) if rows else None, _noted("", report))


def _domain_row(domain: str, subject: str, figures: Mapping[str, Measurement]) -> tuple[str, ...]:
    """The perplexities without their errors, which are those of the text; their ratio's is what counts."""
    plain = ("perplexity", "reference_perplexity", "tokens_judged")
    cells = [cell(figures[name]) if name in figures else "" for name in BY_DOMAIN]
    cells += [number(figures[name].value) if name in figures else "" for name in plain]
    return (f"{domain}, {subject.upper()}", *cells)


def tasks(report: Report) -> Section:
    """Scores in tasks, the float model's and the artifact's."""
    marks = []
    for m in report.measurements:
        kind, _, name = m.name.partition("@")
        if kind in ("task_score", "task_reference") and _finite(m):
            marks.append(Mark.of(name, m.subject if kind == "task_score" else "float", m))
    rows = task_rows(report.measurements)
    plot = page_plots.intervals({"score": marks}, {}, {"float": "float model", **_series(report)}) if marks else ""
    table = TextTable(
        ("", "float model", "artifact", "recovery"), tuple(row[:4] for row in rows), tuple(r[4] for r in rows)
    )
    note = _noted("Questions of lm-evaluation-harness; ± one standard error.", report)
    return Section("Tasks", plot, table if rows else None, note)


def blocks(report: Report) -> Section:
    """Error of each block of the model."""
    series: dict[str, dict[int, float]] = {}
    for m in report.measurements:
        name, _, index = m.name.partition("@")
        if name == "block_error" and index.isdecimal() and len(index) < 10 and math.isfinite(m.value):
            series.setdefault(m.subject, {})[int(index)] = m.value
    if not series:
        return Section("Error by block")
    plot = page_plots.lines(series, _series(report), xlabel="block", ylabel="relative error")
    note = (
        "Relative L2 error of what each block adds to the residual stream, against the float model's block on the same "
        "input: each block answers for itself alone."
    )
    return Section("Error by block", plot, note=_noted(note, report))


def size(report: Report) -> Section:
    """Bytes of the first artifact by part of the model."""
    subject = next(iter(report.artifacts), "")
    parts = {
        m.name.partition("@")[2]: m.value / 1e6
        for m in report.measurements
        if m.name.startswith("part_bytes@") and m.subject == subject and _finite(m)
    }
    bits = next((m for m in report.measurements if m.name == "bits_per_weight" and m.subject == subject), None)
    note = f"{SUBJECTS.get(subject, '')}: {bits.value:.2f} bits a weight in its files." if bits else ""
    return Section("Size by part", page_plots.bars(parts, unit="MB") if parts else "", note=note)


def files(report: Report) -> Section:
    """Bytes of the first artifact by what its files are for."""
    from export.artifacts.artifact import SIMULATOR

    artifact = next(iter(report.details.get("artifacts", {}).values()), None)
    if artifact is None:
        return Section("Size by file")
    roles: dict[str, float] = {}
    for file in artifact["files"]:
        if not file["role"].startswith(SIMULATOR):
            roles[file["role"]] = roles.get(file["role"], 0.0) + file["bytes"] / 1e6
    note = f"{artifact['format']}: all that goes onto the phone."
    return Section("Size by file", page_plots.bars(roles, unit="MB"), note=note)


def published(report: Report) -> Section:
    """The speed on the phone among speeds that others published."""
    title = "Speed on the phone, among published ones"
    own = next((m for m in report.measurements if m.name == "decode_tokens_per_s" and m.subject == "soc"), None)
    artifact = next(iter(report.details.get("artifacts", {}).values()), None)
    if own is None or artifact is None or not _finite(own):
        return Section(title)
    from eval.speed.speed_fit import published as rows_of

    soc = chip(find_soc(str(report.configuration["soc"])).name)
    speed = record(artifact["format"]).speed
    if isinstance(speed, Without):
        return Section(title)
    kind = speed.unit
    rows = [row for row in rows_of("decode") if row.runtime_class == kind]
    plot = page_plots.published_speeds(
        rows,
        soc.name if soc else "",
        artifact["parameters"] / 1e9,
        own,
        {"npu": "NPU", "cpu": "CPU", "ane": "Neural Engine"}.get(kind, kind),
    )
    interval = f", {found}" if (found := _interval(own)) else ""
    return Section(title, plot, note=f"{own.how}: {number(own.value)} tokens/s{interval}. {own.note}.")


def speed(report: Report) -> Section:
    """Everything that is neither accuracy nor a task, with how it was got."""
    figures = [m for m in report.measurements if m.subject not in SUBJECTS]
    rows = tuple((label(m) + PLACES.get(m.subject, ""), format_value(m), _interval(m), m.how) for m in figures)
    notes = tuple("; ".join(text for text in (m.by, m.note) if text) for m in figures)
    table = TextTable(("", "value", "interval", "how"), rows, notes)
    return Section("Speed, size and memory", table=table if rows else None)


def _series(report: Report) -> dict[str, str]:
    """Legends of the artifacts; one that did not run on what ships says so."""
    stand_ins = {m.subject for m in report.measurements if m.how == "emulated"}
    return {name: f"{text}, emulated" if name in stand_ins else text for name, text in SUBJECTS.items()}


def _noted(note: str, report: Report) -> str:
    """A section's note, and what the mark † means there."""
    marks = emulated([m for m in report.measurements if m.subject in SUBJECTS])
    return " ".join([note, *(f"{mark}." for mark in marks)]).strip()


def _finite(m: Measurement) -> bool:
    return math.isfinite(m.value)


def _interval(m: Measurement) -> str:
    return "" if m.low is None or m.high is None else f"{number(m.low)} to {number(m.high)}"


def _facts(report: Report) -> Iterator[tuple[str, TextTable]]:
    """What was done, from what, with which tools."""
    configuration = dict(report.configuration)
    recipe = configuration.pop("recipe", {})
    yield "Recipe", _pairs(recipe)
    yield "Configuration", _pairs(configuration)
    calibration = {k: v for k, v in (report.details.get("calibration") or {}).items() if k != "warnings"}
    yield "Calibration text", _pairs(calibration)
    stages = {s.name: "taken from an earlier run" if s.reused else f"{s.seconds:,.1f} s" for s in report.stages}
    yield "Stages", _pairs(stages)
    yield "SHA-256 of what went in", _pairs(report.inputs)
    yield "Versions", _pairs(report.versions)


def _pairs(values: Mapping[str, Any]) -> TextTable:
    return TextTable(("", ""), tuple((key.replace("_", " "), str(value)) for key, value in values.items()))
