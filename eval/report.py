"""What a run found, as report.json and as tables on the terminal."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bluelm.errors import InputError
from bluelm.system.files import write_text
from bluelm.system.reading import MOST_TABLE_BYTES, read_record
from eval.accuracy.judge import DocumentSums
from eval.budget.budget import Check, Verdict
from eval.budget.confidence import Sample
from eval.budget.limits import NOT_KNOWN, STRUCTURE
from eval.measurement import Measurement

FILE = "report.json"
TOOLS = (
    "bluelm-export",
    "torch",
    "numpy",
    "safetensors",
    "sentencepiece",
    "onnx",
    "onnxruntime",
    "onnxruntime-qnn",
)
MARK = "†"  # behind a value that is emulated
SUBJECTS = {"npu": "NPU artifact", "cpu": "CPU artifact"}  # columns of the table
SOUND = {  # checks that are told in one line where they pass
    "tokenizer_mismatches": "tokenizer",
    "chat_template_mismatches": "chat template",
    "end_token_faults": "end token",
    "versions_missing": "versions recorded",
    "files_changed": "files as they were made",
    "weight_mismatches": "weights, tables, metadata",
    "not_known": "all of it read back",
    "bits_per_weight_deviation": "size",
    "block_error_excess": "blocks",
    "compiled_mismatches": "what compiled graphs tell of themselves",
    "twin_block_excess": "compiled blocks",
    "runner_refusals": "opens in its runner",
    "runner_token_mismatches": "tokens there",
    "runner_chat_mismatches": "chats there",
    "runner_end_faults": "ends there",
    "runner_kl_excess": "arithmetic there",
    "runtime_kl_excess": "arithmetic",
    "position_kl_excess": "every position",
    "reference_to_guess": "predicts text better than guessing",
    "not_better_than_float": "not better than float",
    "not_identical_to_float": "not identical to it",
}
PLACES = {"host": " (this machine)", "soc": " (phone)", "run": " (this run)"}
LABELS = {
    "tokens_judged": "tokens judged",
    "documents_judged": "documents judged",
    "reference_perplexity": "perplexity of the float32 model",
    "perplexity_ratio": "ratio of the two",
    "mean_kl": "mean KL, nats a token",
    "p99_kl": "99th percentile of KL",
    "max_kl": "largest KL",
    "top1_agreement": "top-1 agreement",
    "top5_agreement": "top-5 agreement",
    "first_divergence": "greedy tokens before the first other one",
    "prefill_decode_kl": "KL of decode to prefill, worst positions",
    "prefill_decode_max_difference": "largest difference of logits",
    "runtime_kl": "KL to its own weights, worst positions",
    "prefill_coverage": "share of positions judged in prefill",
    "decode_coverage": "share of positions judged in decode",
    "runner_kl": "KL to its own weights, in its runner",
    "runner_top1_agreement": "top-1 agreement with them there",
    "bits_per_weight": "bits a weight, in the files",
    "npu_node_share": "share of nodes on the NPU",
    "npu_mac_share": "share of multiplications on it",
    "delegated_share": "share of operators in the delegate",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
    "first_token_s": "first token, s",
    "memory_bytes": "memory",
    "artifact_bytes": "artifact, all files",
    "peak_memory_bytes": "peak memory",
    "speed_peak_memory_bytes": "peak memory while measuring",
}


class ReportStage(BaseModel):
    """A step of the run: its folder, how long it took, and whether an earlier run's result was taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    seconds: float
    reused: bool


class Built(BaseModel):
    """An artifact of the run: its folder below the run's, and where it runs on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: str
    on: str


class Report(BaseModel):
    """Everything that a reader needs to believe, repeat or refuse a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    schema_version: Literal[1] = 1
    passed: bool
    title: str
    target: str
    artifacts: dict[str, Built] = Field(description="what accuracy was measured on, by subject: npu, cpu")
    configuration: dict[str, Any]
    inputs: dict[str, str] = Field(description="SHA-256 of what went in")
    versions: dict[str, str]
    stages: tuple[ReportStage, ...]
    measurements: tuple[Measurement, ...]
    documents: dict[str, DocumentSums] = Field(default={}, description="by subject, scores added up by document")
    budget: dict[str, Any]
    checks: tuple[Check, ...]
    details: dict[str, Any] = Field(default={}, description="what the stages say of themselves")
    warnings: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_windows(cls, data: Any) -> Any:
        """Earlier versions added scores up by window: there is nothing to pair them with."""
        return {key: value for key, value in data.items() if key != "windows"} if isinstance(data, dict) else data

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the report of a finished run.

        Raises:
            InputError: there is none, or it was written by another version.
        """
        return cls.read(folder / FILE)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a report.json by itself; raises as `open` does."""
        if not path.is_file():
            fix = "name the folder of a finished run, e.g. dist/<run>"
            raise InputError("this is not the folder of a finished run: it holds no report", where=path, fix=fix)
        try:
            return cls.model_validate_json(read_record(path, MOST_TABLE_BYTES))
        except ValidationError as error:
            fix = "run bluelm-export again with this version"
            raise InputError("the report cannot be read", where=path, fix=fix) from error

    @property
    def samples(self) -> dict[str, dict[str, Sample]]:
        """By subject and domain, what stands behind the errors of its figures."""
        return {name: sums.samples for name, sums in self.documents.items()}

    @property
    def not_known(self) -> list[str]:
        """What was not checked because an artifact's format does not tell it, by artifact."""
        told = self.details.get("not_known", {})
        return [f"{SUBJECTS.get(name, name)}: {text}" for name, texts in told.items() for text in texts]

    def save(self, folder: Path) -> Path:
        """Write `folder`/report.json, all or nothing."""
        path = folder / FILE
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path


def tool_versions(*more: str) -> dict[str, str]:
    """Versions of Python, the system and the packages that shape a result.

    Args:
        more: packages beside `TOOLS`.
    """
    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for tool in (*TOOLS, *more):
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            versions[tool] = "not installed"
    return versions


def show(report: Report, console: Console) -> None:
    """Print the verdict, then the figures."""
    show_verdict(report.title, Verdict(report.checks), console, report.not_known)
    for warning in report.warnings:
        console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False, soft_wrap=True)
    console.print()
    console.print(_accuracy_table(report.measurements))
    for table in (_domain_table(report.measurements), _tasks_table(report.measurements)):
        if table is not None:
            console.print(table)
    for text in emulated(report.measurements):
        console.print(f"[yellow]{escape(text)}[/]", highlight=False, soft_wrap=True)
    console.print(_figures_table(report.measurements))


def show_verdict(title: str, verdict: Verdict, console: Console, not_known: Sequence[str] = ()) -> None:
    """Print whether the budget holds, every limit with its figure, and what no format tells."""
    word = "[bold green]PASSED[/]" if verdict.passed else "[bold red]FAILED[/]"
    console.print(f"\n{word}  {escape(title)}", highlight=False)
    checks, sound = told(verdict.checks)
    for check in checks:
        mark = "[green]ok  [/]" if check.passed else "[red]FAIL[/]"
        console.print(f"  {mark} {escape(str(check))}", highlight=False, soft_wrap=True)
    for text in sound:
        console.print(f"  [green]ok  [/] {text}", highlight=False, soft_wrap=True)
    for text in not_known:
        console.print(f"  [dim]--  [/] not known, {escape(text)}", highlight=False, soft_wrap=True)


def told(checks: Sequence[Check]) -> tuple[list[Check], list[str]]:
    """Checks to be told one by one, and a line an artifact for those of its structure that passed."""
    shown: list[Check] = []
    sound: dict[str, list[str]] = {}
    for check in checks:
        name = SOUND.get(check.name.removeprefix("max_"))
        if name is not None and check.name == f"max_{NOT_KNOWN}" and check.value:
            name = f"{check.value:.0f} items not known, which the budget accepts"
        if check.passed and name is not None:
            sound.setdefault(check.subject, []).append(f"{name} (emulated)" if check.how == "emulated" else name)
        else:
            shown.append(check)
    return shown, [f"as it should be ({subject}): {', '.join(names)}" for subject, names in sound.items()]


def emulated(measurements: Sequence[Measurement]) -> list[str]:
    """The notes that belong to figures marked †: what ran in place of the phone's runtime, by subject."""
    stand_ins = dict.fromkeys((m.subject, m.by) for m in measurements if m.how == "emulated")
    return [f"{MARK} emulated ({SUBJECTS.get(subject, subject)}): {by}" for subject, by in stand_ins]


def cell(m: Measurement) -> str:
    """`format_value`, marked where the figure is emulated."""
    return f"{format_value(m)} {MARK}" if m.how == "emulated" else format_value(m)


def _accuracy_table(measurements: Sequence[Measurement]) -> Table:
    """One row a metric, one column an artifact."""
    artifacts, rows = side_by_side(measurements)
    table = Table(title="Accuracy on held-out text (± one standard error)", title_justify="left")
    table.add_column("figure")
    for artifact in artifacts:
        table.add_column(artifact, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def side_by_side(measurements: Sequence[Measurement]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What was measured of the artifacts: their names, and a row a figure: its label, then a value an artifact."""
    shown = [m for m in measurements if m.subject in SUBJECTS and "@" not in m.name and m.name not in STRUCTURE]
    subjects = [s for s in SUBJECTS if any(m.subject == s for m in shown)]
    rows = []
    for name in dict.fromkeys(m.name for m in shown):
        row = {m.subject: m for m in shown if m.name == name}
        rows.append((label(next(iter(row.values()))), *(cell(row[s]) if s in row else "" for s in subjects)))
    return tuple(SUBJECTS[s] for s in subjects), rows


def _domain_table(measurements: Sequence[Measurement]) -> Table | None:
    """One row a domain of the text and an artifact; None where there is only one domain."""
    figures = {(m.subject, *m.name.partition("@")[::2]): m for m in measurements if m.subject in SUBJECTS}
    rows = [key for key in figures if key[1] == "tokens_judged" and key[2]]
    if not rows:
        return None
    names = ("tokens_judged", "documents_judged", "perplexity_ratio", "mean_kl", "top1_agreement", "top5_agreement")
    table = Table(title="By domain", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(LABELS[name], justify="right")
    for subject, _, domain in rows:
        cells = [cell(m) if (m := figures.get((subject, name, domain))) else "" for name in names]
        table.add_row(f"{escape(domain)}, {SUBJECTS[subject]}", *cells)
    return table


def task_rows(measurements: Sequence[Measurement]) -> list[tuple[str, ...]]:
    """A row a task: its name and artifact, the float model's score, the artifact's, recovery, and a note."""
    figures = {(*m.name.partition("@")[::2], m.subject): m for m in measurements}
    rows = []
    for kind, name, subject in figures:
        if kind == "task_score":
            cells = [figures.get((f"task_{key}", name, subject)) for key in ("reference", "score", "recovery")]
            texts = ["-" if m is None else cell(m) for m in cells]
            rows.append((f"{name}, {SUBJECTS[subject]}", *texts, figures[kind, name, subject].note))
    return rows


def _tasks_table(measurements: Sequence[Measurement]) -> Table | None:
    rows = task_rows(measurements)
    if not rows:
        return None
    table = Table(title="Tasks (± one standard error)", title_justify="left")
    table.add_column("")
    for heading in ("float model", "artifact", "recovery"):
        table.add_column(heading, justify="right")
    for name, *cells, _ in rows:
        table.add_row(escape(name), *cells)
    return table


def _figures_table(measurements: Sequence[Measurement]) -> Table:
    """Speed, size and memory: one row a figure, with how it was got; the notes are in report.json."""
    table = Table(title="Speed, size and memory", title_justify="left")
    for heading in ("figure", "value", "interval", "how"):
        table.add_column(heading, justify="left" if heading in ("figure", "how") else "right")
    for m in measurements:
        if m.subject not in SUBJECTS:
            how = m.how if m.how == "measured" else f"[yellow]{m.how}[/]"
            flags = [flag for flag in ("noisy", "extrapolated") if flag in m.note]
            interval = "" if m.low is None or m.high is None else f"{number(m.low)} to {number(m.high)}"
            table.add_row(f"{label(m)}{PLACES.get(m.subject, '')}", format_value(m), interval, ", ".join([how, *flags]))
    return table


def label(m: Measurement) -> str:
    """What a figure is called in a table."""
    name, _, depth = m.name.partition("@")
    label = LABELS.get(name) or f"{name.replace('_', ' ')} {m.unit}".strip()
    if not depth:
        return label
    return f"{label} behind {depth}" if depth.isdigit() else f"{label}, {depth}"


def format_value(m: Measurement) -> str:
    """Value and error: bytes in MB, an error to two digits, the value as far as its error."""
    if m.unit == "bytes":
        return f"{m.value / 1e6:,.1f} MB"
    if m.error is None or m.low is not None or not math.isfinite(m.error * m.value) or m.error == 0:
        return number(m.value)
    digits = max(0, 1 - math.floor(math.log10(m.error)))
    if digits > 7:
        power = math.floor(math.log10(max(abs(m.value), m.error)))
        return f"({m.value / 10**power:,.{digits + power}f} ± {m.error / 10**power:,.{digits + power}f})e{power}"
    return f"{m.value:,.{digits}f} ± {m.error:,.{digits}f}"


def number(value: float) -> str:
    """Three digits, or whole; "nan" and "inf" as they are."""
    if value >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.3g}"
