"""Every run's figures over time, in one SQLite file that many runs may write at once.

A run and its figures are written in one transaction, in write-ahead mode: a reader sees all of a run or
nothing of it, and never waits for a writer. Writers wait for one another (up to `PATIENCE_S`); none is lost.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from bluelm.errors import InputError
from bluelm.system.files import plain
from bluelm.system.reading import parse_json
from eval.measurement import Measurement

PATIENCE_S = 120
MOST_BYTES = 64 << 20  # of one value
LAYOUT = 2
OLD_LAYOUT = 1  # without what ran to get a figure; the first writer adds the column
_MEASUREMENT = TypeAdapter(Measurement)  # SQLite holds whatever type is written
_COLUMNS = tuple(f.name for f in fields(Measurement))
_QUOTED = ", ".join(f'"{name}"' for name in _COLUMNS)
_TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, time TEXT NOT NULL, title TEXT NOT NULL, target TEXT NOT NULL,
    passed INTEGER NOT NULL, accepted INTEGER NOT NULL, facts TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS figures (
    run INTEGER NOT NULL REFERENCES runs (id), name TEXT NOT NULL, value REAL, unit TEXT NOT NULL,
    how TEXT NOT NULL, error REAL, n INTEGER, note TEXT NOT NULL, subject TEXT NOT NULL, low REAL, high REAL,
    "by" TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS figures_by_name ON figures (name, subject, run);
"""


@dataclass(frozen=True)
class KeptRun:
    """One run as it is kept.

    Attributes:
        title: model, recipe and chip in words: runs of the same title are repeats of one another.
        target: e.g. "snapdragon (sm8650)". passed: its verdict.
        accepted: whether later runs may be compared with it (a run that passed, unless said otherwise).
        facts: whatever explains it: configuration, versions, digests; JSON values.
        time: UTC, ISO 8601. id: given by the file, in the order of writing.
    """

    title: str
    target: str
    passed: bool
    measurements: tuple[Measurement, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    accepted: bool | None = None
    time: str = ""
    id: int | None = None

    def figure(self, name: str, subject: str | None = None) -> Measurement | None:
        """The figure of that name, of that subject if one is named."""
        return next((m for m in self.measurements if m.name == name and subject in (None, m.subject)), None)


def default_path() -> Path:
    """$BLUELM_EXPORT_HISTORY, or history.sqlite in the user's data folder."""
    named = os.environ.get("BLUELM_EXPORT_HISTORY")
    if named:
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "bluelm-export" / "history.sqlite"


class History:
    """The store; each call opens the file for itself, so one object may serve many threads."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()

    @contextmanager
    def _open(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        try:
            if write and not self.path.exists():
                _create(self.path)
            mode = "rw" if write else "ro"
            _check_regular(self.path)
            location = f"{self.path.absolute().as_uri()}?mode={mode}"
            with closing(sqlite3.connect(location, timeout=PATIENCE_S, isolation_level=None, uri=True)) as file:
                file.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
                version = _renewed(file) if write else _version(file)
                if version not in (LAYOUT, OLD_LAYOUT):
                    fix = "name another file with --history, or use the version that wrote it"
                    raise InputError(f"the history has layout {version}, not {LAYOUT}", where=self.path, fix=fix)
                _check_tables(file)
                yield file
        except (sqlite3.Error, OSError, OverflowError, ValueError) as error:  # ValueError: what lies in it is damaged
            fix = "name another file with --history"
            raise InputError(f"the history cannot be used: {error}", where=self.path, fix=fix) from error

    def check(self) -> None:
        """See that a run can be appended, without writing.

        Raises:
            InputError: not a history, or no permission.
        """
        if self.path.exists():
            self.runs(last=1)
        there = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(there, os.W_OK) or (there != self.path and not there.is_dir()):
            fix = "name another file with --history"
            raise InputError("the history cannot be written here", where=there, fix=fix)

    def append(self, run: KeptRun) -> int:
        """Write a run, all or nothing.

        Returns:
            its number.

        Raises:
            InputError: not a history, no permission, or others wrote for longer than `PATIENCE_S`.
        """
        time = run.time or datetime.now(UTC).isoformat(timespec="milliseconds")
        accepted = run.passed if run.accepted is None else run.accepted
        facts = json.dumps(plain(run.facts), ensure_ascii=False, sort_keys=True, default=str)
        figures = [tuple(asdict(m).values()) for m in run.measurements]
        places = ", ".join("?" * (1 + len(_COLUMNS)))
        with self._open(write=True) as file:
            file.execute("BEGIN IMMEDIATE")
            try:
                columns = "time, title, target, passed, accepted, facts"
                number = file.execute(
                    f"INSERT INTO runs ({columns}) VALUES (?, ?, ?, ?, ?, ?)",
                    (time, run.title, run.target, run.passed, accepted, facts),
                ).lastrowid
                assert number is not None
                file.executemany(
                    f"INSERT INTO figures (run, {_QUOTED}) VALUES ({places})",
                    [(number, *figure) for figure in figures],
                )
                file.execute("COMMIT")
            except BaseException:
                if file.in_transaction:
                    file.execute("ROLLBACK")
                raise
        return number

    def runs(self, *, title: str | None = None, target: str | None = None, last: int | None = None) -> list[KeptRun]:
        """Runs in the order of writing, the last so many; [] where there is no history yet."""
        if not self.path.exists():
            return []
        clauses = {"title": title, "target": target}
        given = {name: value for name, value in clauses.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in given) or "1"
        limit = -1 if last is None else last
        with self._open(write=False) as file:
            file.execute("BEGIN")  # one view of both tables
            rows = file.execute(
                "SELECT id, time, title, target, passed, accepted, facts FROM runs "
                f"WHERE {where} ORDER BY id DESC LIMIT ?",
                (*given.values(), limit),
            ).fetchall()
            return [_run(row, _figures(file, row[0])) for row in reversed(rows)]

    def last_accepted(self, title: str) -> KeptRun | None:
        """The newest run of that title that later ones are compared with."""
        return next((run for run in reversed(self.runs(title=title)) if run.accepted), None)

    def accept(self, number: int, accepted: bool = True) -> None:
        """Let later runs be compared with this one, or not.

        Raises:
            InputError: no such run.
        """
        with self._open(write=True) as file:
            changed = file.execute("UPDATE runs SET accepted = ? WHERE id = ?", (accepted, number)).rowcount
            if not changed:
                raise InputError(f"there is no run {number}", where=self.path, fix="see: bluelm-export history")


def _create(path: Path) -> None:
    """A new file appears with its tables in it, or not at all; of several at once, the first wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".history-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        with closing(sqlite3.connect(temporary, isolation_level=None)) as file:
            file.execute("PRAGMA journal_mode = WAL")
            file.executescript(f"{_TABLES} PRAGMA user_version = {LAYOUT};")
        with suppress(FileExistsError):
            os.link(temporary, path)


def _check_regular(path: Path) -> None:
    """ValueError where SQLite would wait for the other end of a pipe."""
    for beside in ("", "-wal", "-shm", "-journal"):
        part = path.with_name(path.name + beside)
        if part.exists() and not part.is_file():
            raise ValueError(f"{part.name} is not a regular file")


def _check_tables(file: sqlite3.Connection) -> None:
    """ValueError where another hand put into the file what SQLite would run: views, triggers, computed columns."""
    ours = {("table", "runs"), ("table", "figures"), ("index", "figures_by_name")}
    for kind, name, code in file.execute("SELECT type, name, sql FROM sqlite_master"):
        if name.startswith("sqlite_stat"):  # of ANALYZE
            continue
        if (kind, name) not in ours or not code.upper().startswith(f"CREATE {kind.upper()} "):
            raise ValueError(f"it holds a {kind} {name!r}, which is none of ours")
    for table in ("runs", "figures"):
        for row in file.execute(f"PRAGMA table_xinfo({table})"):
            if row[6]:
                raise ValueError(f"{table} holds a computed column {row[1]!r}")


def _version(file: sqlite3.Connection) -> int:
    return file.execute("PRAGMA user_version").fetchone()[0]


def _renewed(file: sqlite3.Connection) -> int:
    """The layout; of writers that find the old one, the first makes it the new one."""
    if _version(file) != OLD_LAYOUT:
        return _version(file)
    file.execute("BEGIN IMMEDIATE")
    if _version(file) == OLD_LAYOUT:
        file.execute("ALTER TABLE figures ADD COLUMN \"by\" TEXT NOT NULL DEFAULT ''")
        file.execute(f"PRAGMA user_version = {LAYOUT}")
    file.execute("COMMIT")
    return _version(file)


def _figures(file: sqlite3.Connection, number: int) -> tuple[Measurement, ...]:
    old = _version(file) == OLD_LAYOUT
    names = [name for name in _COLUMNS if name != "by"] if old else list(_COLUMNS)
    quoted = ", ".join(f'"{name}"' for name in names)
    found = file.execute(f"SELECT {quoted} FROM figures WHERE run = ? ORDER BY rowid", (number,))
    rows = [dict(zip(names, row, strict=True)) for row in found]
    nan = float("nan")  # SQLite keeps NaN as NULL
    values = [{**row, "value": nan if row["value"] is None else row["value"]} for row in rows]
    return tuple(_MEASUREMENT.validate_python(row) for row in values)


def _run(row: Sequence[Any], measurements: tuple[Measurement, ...]) -> KeptRun:
    number, time, title, target, passed, accepted, facts = row
    try:
        told = parse_json(facts, "")
    except InputError as error:
        raise ValueError(f"run {number}: {error.problem}") from None
    if not (isinstance(told, dict) and all(isinstance(text, str) for text in (time, title, target))):
        raise ValueError(f"run {number} is damaged")
    return KeptRun(title, target, bool(passed), measurements, told, bool(accepted), time, number)


def names(runs: Sequence[KeptRun]) -> list[tuple[str, str]]:
    """Names and subjects of all figures in these runs, sorted."""
    return sorted({(m.name, m.subject) for run in runs for m in run.measurements})


class MlflowHistory:
    """The same runs on an MLflow server, or in any store that MLflow's URI names (extra `mlflow`)."""

    EXPERIMENT = "bluelm-export"

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @classmethod
    def from_environment(cls) -> Self | None:
        """Where MLFLOW_TRACKING_URI points to, if it is set."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        return cls(uri) if uri else None

    def append(self, run: KeptRun) -> str:
        """Send a run with one metric a figure, named subject/name, and its interval's ends.

        Returns:
            MLflow's number of the run.

        Raises:
            UnavailableError: the server does not answer or refuses.
        """
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        from bluelm.errors import UnavailableError

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # not minutes behind a finished run
        try:
            client = MlflowClient(tracking_uri=self.uri)
            experiment = client.get_experiment_by_name(self.EXPERIMENT)
            number = experiment.experiment_id if experiment else client.create_experiment(self.EXPERIMENT)
            started = client.create_run(number, run_name=run.title)
            now = int(datetime.now(UTC).timestamp() * 1000)
            client.log_batch(
                started.info.run_id,
                metrics=[Metric(name, value, now, 0) for name, value in _metrics(run)],
                params=[Param(k, str(v)[:6000]) for k, v in run.facts.get("configuration", {}).items()],
                tags=[RunTag("target", run.target), RunTag("passed", str(run.passed).lower())],
            )
            client.set_terminated(started.info.run_id, "FINISHED" if run.passed else "FAILED")
        except (MlflowException, OSError) as error:
            fix = "check MLFLOW_TRACKING_URI; the run is kept in the local history"
            raise UnavailableError(f"MLflow refused the run: {error}", where=self.uri, fix=fix) from error
        return started.info.run_id


def _metrics(run: KeptRun) -> Iterator[tuple[str, float]]:
    for m in run.measurements:
        name = f"{m.subject or 'run'}/{m.name}".replace("@", "_at_")  # MLflow allows no @
        yield name, m.value
        for end, value in (("low", m.low), ("high", m.high), ("error", m.error)):
            if value is not None:
                yield f"{name}.{end}", value
