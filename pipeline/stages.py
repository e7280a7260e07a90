"""Stages of a run: each a folder, done once for the same input and reused afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from bluelm.errors import ExportError, InputError
from bluelm.files import write_text
from eval.report import Stage

RECORDS = ".stages"
PARTIAL = ".partial"
log = logging.getLogger("bluelm_export")


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a stage's result, given as JSON values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


@cache
def code(*packages: str) -> str:
    """SHA-256 over the sources of our own packages: a stage made by other code is made again."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(p for package in packages for p in (root / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Stages:
    """The stages of one run folder, in the order in which they are asked for."""

    def __init__(self, folder: Path, tell: Callable[[str], object] = log.info) -> None:
        self.folder = folder
        self._tell = tell
        self.done: list[Stage] = []

    def is_done(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether an earlier run finished this stage from this input and its files are as it left them."""
        record = self._record(name)
        if not record.is_file():
            return False
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return False
        if not isinstance(found, dict) or found.get("fingerprint") != fingerprint(inputs):
            return False
        return _same(found.get("files"), _files(self.folder / name))

    def run(self, name: str, inputs: Mapping[str, Any], work: Callable[[Path], object]) -> Path:
        """Do a stage, or take an earlier run's result.

        Args:
            name: of the stage and its folder.
            inputs: all that decides the result.
            work: writes the folder that it is given, which does not exist yet. It may keep what a broken-off
                run can go on from in `<folder>.partial`; what other input left there is removed first.

        Returns:
            the stage's folder.
        """
        folder = self.folder / name
        if self.is_done(name, inputs):
            self._tell(f"{name}: unchanged, taken from an earlier run")
            self.done.append(Stage(name=name, seconds=0, reused=True))
            return folder
        started = time.monotonic()
        record, begun = self._record(name), self.folder / RECORDS / f"{name}.begun"
        if not begun.is_file() or begun.read_text() != fingerprint(inputs):
            shutil.rmtree(folder.with_name(f"{name}{PARTIAL}"), ignore_errors=True)
        write_text(begun, fingerprint(inputs))
        record.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        work(folder)
        content = {"fingerprint": fingerprint(inputs), "files": _files(folder)}
        write_text(record, json.dumps(content, indent=1, sort_keys=True))
        self.done.append(Stage(name=name, seconds=round(time.monotonic() - started, 2), reused=False))
        return folder

    def _record(self, name: str) -> Path:
        return self.folder / RECORDS / f"{name}.json"


def _same(recorded: Any, found: Mapping[str, list[int]]) -> bool:
    """Whether nobody touched the files. Some of CI's caches keep times in whole seconds only: those are the same."""
    if not isinstance(recorded, dict) or recorded.keys() != found.keys():
        return False
    second = 10**9
    return all(found[path] in ([size, time], [size, time - time % second]) for path, (size, time) in recorded.items())


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of every file of a stage: enough to see that somebody touched it."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): [p.stat().st_size, p.stat().st_mtime_ns] for p in paths}


@contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """Make and lock a run's folder; where an error or Ctrl-C leaves a new one without results, it is removed.

    Raises:
        InputError: it is a file, or another run is writing into it now.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    if folder.exists() and not folder.is_dir():
        raise InputError("the run's folder is a file", where=folder, fix="give another --out or --name")
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    try:
        with (folder / RECORDS / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                fix = "wait for it to end, or give another --name"
                raise InputError("another run is writing into this folder", where=folder, fix=fix) from error
            yield folder
    except (ExportError, KeyboardInterrupt) as error:
        resumable = not isinstance(error, ExportError)
        if made and not _holds_results(folder, resumable):
            shutil.rmtree(folder)
            for parent in made[1:]:
                if not any(parent.iterdir()):
                    parent.rmdir()
        raise


def _holds_results(folder: Path, resumable: bool) -> bool:
    """Whether a stage is finished or, if the run can be resumed, begun in earnest."""
    begun = resumable and any(p.suffix == PARTIAL for p in folder.iterdir())
    return begun or any(p.suffix == ".json" for p in (folder / RECORDS).iterdir())
